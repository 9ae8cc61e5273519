"""Coupled groups of a decoder, found with torch-pruning's dependency graph."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM

from tailored_llama import models
from tailored_llama.config import Work
from tailored_llama.errors import InputError
from tailored_llama.store import read_table, write_table

Array = np.ndarray[Any, Any]

KINDS = ("attention", "mlp")
GROUPS_SCHEMA = pa.schema(
    {"group": pa.int32(), "layer": pa.int16(), "kind": pa.string(), "index": pa.int32(), "parameters": pa.int64()}
)


@dataclass(frozen=True)
class Groups:
    """All coupled groups of a model, layer by layer, column by column, [groups] each.

    `kind` is "attention" (one KV head with its query heads) or "mlp" (one channel); `index` counts within the layer and
    kind.
    """

    layer: Array
    kind: Array
    index: Array
    parameters: Array

    def __len__(self) -> int:
        return len(self.layer)


Owners = dict[str, tuple[int, Array]]  # parameter → the dimension that groups own, and each index's group, or −1
Stays = dict[str, tuple[int, Array]]  # parameter → that dimension, and whether each index stays, bool
# The projections of a layer that a KV head owns, and an MLP channel: rows of those that produce it ("out"), columns of
# those that read it ("in").
COUPLED = {
    "attention": [(f"self_attn.{name}_proj", "in" if name == "o" else "out") for name in "kovq"],
    "mlp": [("mlp.gate_proj", "out"), ("mlp.up_proj", "out"), ("mlp.down_proj", "in")],
}


def coupled(model_type: str) -> dict[str, list[tuple[str, str]]]:
    """The kinds that can leave a model type, and what each couples."""
    family = models.family_of(model_type)
    kinds = {"all": KINDS, "channels": KINDS[1:], "tokens": ()}[family.level]
    return {
        kind: [(name, side) for name, side in COUPLED[kind] if family.gated or name != "mlp.gate_proj"]
        for kind in kinds
    }


def build_graph(dense: Path, *, settings: None, work: Work) -> dict[str, Any]:
    """Stage: write `groups.parquet` for a checkpoint; no weight is read.

    One layer is traced, as all layers of a decoder are wired alike.

    Raises:
        InputError: the dependency graph couples parameters other than those of a LLaMA layer.
    """
    structure, shapes = models.read_structure(dense), models.all_tensor_shapes(dense)
    depth, counts = structure.depth, _counts(structure)
    # Four heads, as layers are wired alike whatever their number: torch-pruning 1.6 never ends on two of Gemma 3.
    if counts:
        config = models.read_config(dense)
        first_layer = {name: config[name][:1] for name in models.BY_LAYER if name in config}
        check_coupling(config | {"num_hidden_layers": 1} | first_layer, heads=4, channels=structure.layer.channels)
    kinds = [(kind, index) for kind, count in counts.items() for index in range(count)]  # of a layer's groups
    parameters = np.zeros(depth * len(kinds), int)
    for name, (dim, owner) in owners_of(dense).items():
        width = math.prod(shapes[name]) // shapes[name][dim]
        parameters += width * np.bincount(owner[owner >= 0], minlength=len(parameters))
    columns = {"group": range(len(parameters)), "layer": np.repeat(range(depth), len(kinds)), "parameters": parameters}
    columns |= {"kind": [kind for kind, _ in kinds] * depth, "index": [index for _, index in kinds] * depth}
    write_table(work.out / "groups.parquet", columns, GROUPS_SCHEMA)
    return {"groups": len(parameters)}


def _counts(structure: models.Structure) -> dict[str, int]:
    """How many groups of each kind a layer has."""
    counts = {"attention": structure.layer.kv_heads, "mlp": structure.layer.channels}
    return {kind: counts[kind] for kind in coupled(structure.model_type)}


def read_groups(folder: Path) -> Groups:
    table = read_table(folder / "groups.parquet", GROUPS_SCHEMA)
    columns = {name: table[name].to_numpy() for name in ("layer", "index", "parameters")}
    return Groups(kind=np.array(table["kind"].to_pylist(), str), **columns)


def owners_of(dense: Path) -> Owners:
    """The group of each index in the parameters of a checkpoint.

    A projection that reads the groups holds them in columns; one that produces them, in rows (and the bias). All groups
    of a layer and kind are equally wide.
    """
    structure, shapes = models.read_structure(dense), models.all_tensor_shapes(dense)
    held = {name: (stored, rows) for stored in shapes for name, rows in models.unfused(stored, structure).items()}
    projections, owners, first = coupled(structure.model_type), Owners(), 0
    for number in range(structure.depth):
        for kind, count in _counts(structure).items():
            numbers = np.arange(first, first + count)
            for projection, side in projections[kind]:
                for parameter in ("weight", "bias") if side == "out" else ("weight",):
                    if (name := f"model.layers.{number}.{projection}.{parameter}") in held:
                        (stored, rows), dim = held[name], int(side == "in")
                        owner = owners.setdefault(stored, (dim, np.full(shapes[stored][dim], -1)))[1][rows]
                        owner[:] = np.repeat(numbers, len(owner) // count)
            first += count
    return owners


def staying(owners: Owners, kept: Array) -> Stays:
    """The indices that stay in each parameter, if the groups of a mask, bool [groups], do."""
    return {name: (dim, (owner < 0) | kept[owner]) for name, (dim, owner) in owners.items()}


def check_coupling(config: dict[str, Any], heads: int, channels: int) -> None:
    """Check that in each layer of these widths a KV head and an MLP channel couple what `COUPLED` says, by index.

    A twin is traced, as torch-pruning does not follow the head sharing of grouped-query attention (under sdpa it pairs
    KV head 0 with query head 0 alone, under eager it stops at k_proj), nor fused projections such as Phi-3's. It has no
    weights, and a KV head for every query head. That of a Phi-3 is a Mistral, the same layer with projections apart.

    Raises:
        InputError: other parameters are coupled.
    """
    import torch_pruning as tp  # late: only this stage needs it

    twin, inputs = _meta_twin(config, models.Layer(heads, heads, channels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about norms as unwrapped parameters; the hidden width is never pruned
        graph = tp.DependencyGraph().build_dependency(
            twin, example_inputs=inputs, forward_fn=lambda model, kwargs: model(**kwargs)
        )
    names, projections = {module: name for name, module in twin.named_modules()}, coupled(config["model_type"])

    def members(root: Any, indices: list[int]) -> dict[tuple[str, str], list[int]]:
        """The indices of each projection's side, "out" or "in", that are coupled with `indices` of a root's outputs."""
        group: dict[tuple[str, str], list[int]] = {}
        for dependency, positions in graph.get_pruning_group(root, tp.prune_linear_out_channels, idxs=indices):
            module, handler = dependency.target.module, dependency.handler
            if module in names:  # the others are element-wise operations, which hold no parameters
                side = "in" if handler.__name__ == tp.prune_linear_in_channels.__name__ else "out"
                group[names[module], side] = sorted(int(getattr(i, "idx", i)) for i in positions)
        return group

    for number, block in enumerate(twin.model.layers):
        head = block.self_attn.head_dim
        widths = [("attention", range(i * head, (i + 1) * head)) for i in range(heads)]
        for kind, indices in [*widths, ("mlp", range(channels))]:
            if kind not in projections:
                continue
            root = block.get_submodule(projections[kind][0][0])
            expected = {(f"model.layers.{number}.{name}", side): list(indices) for name, side in projections[kind]}
            if (group := members(root, list(indices))) != expected:
                raise InputError(
                    f"layer {number}, {kind}: the dependency graph couples {sorted(group)}; "
                    f"allowed: {sorted(expected)}, index by index"
                )


def _meta_twin(dense: dict[str, Any], layer: models.Layer) -> tuple[Any, dict[str, Any]]:
    """The model without weights, and inputs to trace it with."""
    if twin_type := models.family_of(dense["model_type"]).twin:
        names = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim")
        dense = {name: dense[name] for name in names if name in dense} | {"model_type": twin_type}
    config = models.layout_config(dense, layer)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        inputs = {
            "input_ids": torch.zeros(1, 4, dtype=torch.long),
            "attention_mask": torch.zeros(1, 1, 4, 4),  # 4-D: the masking code cannot read a meta tensor
            "position_ids": torch.arange(4)[None],
            "use_cache": False,
        }
    twin.requires_grad_(True)  # torch-pruning traces autograd's graph
    return twin, inputs
