"""Coupled groups of a decoder, found by torch-pruning's dependency graph."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch_pruning as tp
from transformers import AutoModelForCausalLM

from tailored_llama.artifacts import read_table, write_table
from tailored_llama.checkpoints import Layer, Structure, layered_config, read_config, read_structure
from tailored_llama.errors import InputError

GROUPS_SCHEMA = pa.schema(
    {"group": pa.int32(), "layer": pa.int16(), "kind": pa.string(), "index": pa.int32(), "parameters": pa.int64()}
)
MEMBERS_SCHEMA = pa.schema(
    {
        "group": pa.int32(),
        "parameter": pa.dictionary(pa.int16(), pa.string()),
        "dim": pa.int8(),
        "start": pa.int32(),
        "stop": pa.int32(),
    }
)


@dataclass(frozen=True)
class Groups:
    """All coupled groups of a model, column by column; row g describes group g.

    `layer`, `index` and `parameters` have shape [groups]; `kind` is "attention" (one KV head with its query heads) or
    "mlp" (one channel); `index` counts within the layer and kind.
    """

    layer: np.ndarray[Any, Any]
    kind: np.ndarray[Any, Any]
    index: np.ndarray[Any, Any]
    parameters: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.layer)


@dataclass(frozen=True)
class Slices:
    """Which group owns each index of one parameter's dimension: `owner[i]` is a group, or -1."""

    parameter: str
    dim: int
    owner: np.ndarray[Any, Any]


def build_graph(dense: Path, out: Path) -> dict[str, Any]:
    """Stage: write `groups.parquet` and `members.parquet` for a checkpoint; no weight is read."""
    structure = read_structure(dense)
    rows: list[tuple[int, str, int, int]] = []
    members: list[tuple[int, str, int, int, int]] = []
    for layer, kind, index, parts, count in _enumerate(dense, structure):
        for parameter, dim, start, stop in parts:
            members.append((len(rows), parameter, dim, start, stop))
        rows.append((layer, kind, index, count))
    layers, kinds, indices, counts = zip(*rows, strict=True)
    write_table(
        out / "groups.parquet",
        {"group": range(len(rows)), "layer": layers, "kind": kinds, "index": indices, "parameters": counts},
        GROUPS_SCHEMA,
    )
    owners, names, dims, starts, stops = zip(*members, strict=True)
    write_table(
        out / "members.parquet",
        {
            "group": owners,
            "parameter": pa.array(names).dictionary_encode().cast(MEMBERS_SCHEMA.field("parameter").type),
            "dim": dims,
            "start": starts,
            "stop": stops,
        },
        MEMBERS_SCHEMA,
    )
    return {"groups": len(rows)}


def read_groups(folder: Path) -> Groups:
    """Read `groups.parquet`."""
    table = read_table(folder / "groups.parquet", GROUPS_SCHEMA)
    columns = {name: table[name].to_numpy() for name in ("layer", "index", "parameters")}
    return Groups(kind=np.array(table["kind"].to_pylist()), **columns)


def read_slices(folder: Path, structure_shapes: dict[str, list[int]]) -> list[Slices]:
    """Read `members.parquet` as one owner array per (parameter, dimension).

    Args:
        folder: the groups artifact.
        structure_shapes: shape of every parameter of the checkpoint, by name.
    """
    table = read_table(folder / "members.parquet", MEMBERS_SCHEMA)
    names = table["parameter"].to_numpy()
    columns = [table[c].to_numpy() for c in ("group", "dim", "start", "stop")]
    owners: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
    for name, group, dim, start, stop in zip(names, *columns, strict=True):
        key = (str(name), int(dim))
        if key not in owners:
            if key[0] not in structure_shapes:
                raise InputError(f"{folder}: parameter {key[0]} is not in the checkpoint")
            owners[key] = np.full(structure_shapes[key[0]][dim], -1, dtype=np.int64)
        owners[key][start:stop] = group
    return [Slices(name, dim, owner) for (name, dim), owner in owners.items()]


Part = tuple[str, int, int, int]  # parameter, dim, start, stop


def _enumerate(dense: Path, structure: Structure) -> Iterator[tuple[int, str, int, list[Part], int]]:
    """Every group as (layer, kind, index, parts, parameters).

    torch-pruning does not follow the head sharing of grouped-query attention: under sdpa it pairs KV head 0 with query
    head 0 alone, under eager it stops at k_proj. So the graph is traced on a twin in which every query head has its own
    KV head, and the KV rows of a group are mapped back afterwards.
    """
    twin, inputs = _meta_twin(dense, structure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names the norms as unwrapped parameters; hidden width is never pruned
        graph = tp.DependencyGraph().build_dependency(
            twin, example_inputs=inputs, forward_fn=lambda model, kwargs: model(**kwargs)
        )
    names = {module: name for name, module in twin.named_modules()}
    prune_out, prune_in = tp.prune_linear_out_channels, tp.prune_linear_in_channels

    def members(root: Any, indices: list[int]) -> dict[tuple[str, str], list[int]]:
        """(module name, "out" or "in") → the indices that go with `indices` of the root's outputs."""
        found: dict[tuple[str, str], list[int]] = {}
        for dependency, together in graph.get_pruning_group(root, prune_out, idxs=indices):
            module, handler = dependency.target.module, dependency.handler
            if module in names:  # the others are element-wise operations, which hold no parameters
                side = "in" if handler.__name__ == prune_in.__name__ else "out"
                found[names[module], side] = sorted(int(getattr(i, "idx", i)) for i in together)
        return found

    hidden, head_dim = structure.hidden_size, structure.head_dim
    for number, (block, layer) in enumerate(zip(twin.model.layers, structure.layers, strict=True)):
        prefix = f"model.layers.{number}"
        share = layer.heads // layer.kv_heads
        for index in range(layer.kv_heads):
            query = list(range(index * share * head_dim, (index + 1) * share * head_dim))
            expected = {
                (f"{prefix}.self_attn.{p}_proj", "in" if p == "o" else "out"): query for p in ("q", "k", "v", "o")
            }
            _expect(members(block.self_attn.k_proj, query), expected, f"{prefix} KV head {index}")
            rows = {
                "q": (query[0], query[-1] + 1),
                "k": (index * head_dim, (index + 1) * head_dim),
                "v": (index * head_dim, (index + 1) * head_dim),
                "o": (query[0], query[-1] + 1),
            }
            parts = [
                part
                for p, (start, stop) in rows.items()
                for part in _parts(block.self_attn, f"{prefix}.self_attn.", f"{p}_proj", p == "o", start, stop)
            ]
            yield number, "attention", index, parts, _count(parts, hidden)
        channels = list(range(layer.channels))
        expected = {
            (f"{prefix}.mlp.{p}_proj", "in" if p == "down" else "out"): channels for p in ("gate", "up", "down")
        }
        _expect(members(block.mlp.gate_proj, channels), expected, f"{prefix} MLP")
        for index in channels:
            parts = [
                part
                for p in ("gate", "up", "down")
                for part in _parts(block.mlp, f"{prefix}.mlp.", f"{p}_proj", p == "down", index, index + 1)
            ]
            yield number, "mlp", index, parts, _count(parts, hidden)


def _expect(found: dict[tuple[str, str], list[int]], expected: dict[tuple[str, str], list[int]], where: str) -> None:
    if found != expected:
        raise InputError(
            f"{where}: the dependency graph couples {sorted(found)}; allowed: {sorted(expected)}, index by index"
        )


def _parts(parent: Any, prefix: str, name: str, inward: bool, start: int, stop: int) -> list[Part]:
    """The slices of one projection that go with a group: columns where it reads the group, rows where it makes it."""
    if inward:
        return [(f"{prefix}{name}.weight", 1, start, stop)]
    parts = [(f"{prefix}{name}.weight", 0, start, stop)]
    if getattr(parent, name).bias is not None:
        parts.append((f"{prefix}{name}.bias", 0, start, stop))
    return parts


def _count(parts: list[Part], hidden: int) -> int:
    return sum((stop - start) * (1 if name.endswith(".bias") else hidden) for name, _, start, stop in parts)


def _meta_twin(dense: Path, structure: Structure) -> tuple[Any, dict[str, Any]]:
    """The model without weights, each query head with a KV head of its own, and inputs to trace it with."""
    layers = tuple(Layer(layer.heads, layer.heads, layer.channels) for layer in structure.layers)
    config = layered_config(read_config(dense), layers)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        length = 4
        inputs = {
            "input_ids": torch.zeros(1, length, dtype=torch.long),
            "attention_mask": torch.zeros(1, 1, length, length),  # 4-D: the masking code cannot read a meta tensor
            "position_ids": torch.arange(length)[None],
            "use_cache": False,
        }
    twin.requires_grad_(True)  # torch-pruning traces autograd's graph
    return twin, inputs
