"""Pruning: groups, importance, plans, and surgery that changes nothing it should not."""

import os
import signal
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import prune, save_tiny_llama
from tailored_llama.config import PruningConfig, Work
from tailored_llama.errors import InputError
from tailored_llama.models import load_model, read_config, read_structure, weight_files, writing
from tailored_llama.pruning import build_graph, read_groups
from tailored_llama.pruning.groups import KINDS, Groups, owners_of
from tailored_llama.pruning.importance import write_importance
from tailored_llama.pruning.plan import keep, plan

IDS = torch.tensor([[5, 9, 200, 31, 77, 14, 3, 8]])
SHAPES = {
    "grouped-query": {},
    "multi-head, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "multi-query": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd head_dim": {"head_dim": 6},
}


def prepare(tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    dense, groups = save_tiny_llama(tmp_path / "dense", **changes), tmp_path / "groups"
    groups.mkdir()
    build_graph(dense, settings=None, work=Work(groups))
    return dense, groups


def shapes_of(dense: Path) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in load_file(dense / "model.safetensors").items()}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_groups_cover_every_prunable_parameter_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense, folder = prepare(tmp_path, **changes)
    groups, shapes = read_groups(folder), shapes_of(dense)
    counted = np.zeros(len(groups), dtype=np.int64)
    for name, (_, owner) in owners_of(dense).items():
        assert (owner >= 0).all(), name
        np.add.at(counted, owner, int(np.prod(shapes[name])) // len(owner))
    assert (counted == groups.parameters).all()


def test_a_group_of_grouped_query_attention_holds_its_own_query_heads(tmp_path: Path) -> None:
    dense, folder = prepare(tmp_path)
    groups = read_groups(folder)
    second = int(np.flatnonzero((groups.layer == 1) & (groups.kind == "attention") & (groups.index == 1))[0])
    owned = {
        (name.split(".")[-2], dim): np.flatnonzero(owner == second).tolist()
        for name, (dim, owner) in owners_of(dense).items()
        if (owner == second).any()
    }
    kv, queries = list(range(8, 16)), list(range(16, 32))
    assert owned == {("q_proj", 0): queries, ("k_proj", 0): kv, ("v_proj", 0): kv, ("o_proj", 1): queries}


def pruned_checkpoint(tmp_path: Path, ratio: float, pruning: PruningConfig, **changes: Any) -> tuple[Path, Path]:
    dense, folder = prepare(tmp_path, **changes)
    groups = read_groups(folder)
    write_importance(folder, groups, np.random.default_rng(2).random(len(groups)), "random")
    out = tmp_path / "pruned"
    out.mkdir()
    prune(dense, folder, folder, None, ratio=ratio, pruning=pruning, out=out)
    return dense, out


PRUNING = PruningConfig(min_channels=2)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "llama"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 30, "head_dim": 6}, "mistral"),
    ],
)
def test_a_saved_checkpoint_reloads_with_equal_logits(tmp_path: Path, changes: dict[str, Any], kind: str) -> None:
    _, out = pruned_checkpoint(tmp_path, 0.2, PRUNING, **changes)
    assert read_config(out)["model_type"] == kind
    first = AutoModelForCausalLM.from_pretrained(out)
    again = tmp_path / "again"
    first.save_pretrained(again)
    second = AutoModelForCausalLM.from_pretrained(again)
    with torch.no_grad():
        assert torch.equal(first(IDS).logits, second(IDS).logits)
    assert str(tmp_path) not in (again / "config.json").read_text() + (out / "config.json").read_text()


def test_generation_is_the_same_with_and_without_the_cache(tmp_path: Path) -> None:
    _, out = pruned_checkpoint(tmp_path, 0.2, PRUNING)
    model = load_model(out)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    cached, plain = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    assert cached.shape == (1, IDS.shape[1] + 12)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_the_saved_model_has_the_asked_ratio_of_all_parameters(tmp_path: Path, ratio: float) -> None:
    """Within one MLP channel of every layer: on this model a channel is 0.4 % of all parameters, on 7B 0.0002 %."""
    sizes = {"hidden_size": 64, "intermediate_size": 512, "head_dim": 16}
    dense, out = pruned_checkpoint(tmp_path, ratio, PRUNING, **sizes)
    before, after = read_structure(dense).parameters, read_structure(out).parameters
    assert after == sum(p.numel() for p in load_model(out).parameters())
    assert 1 - after / before == pytest.approx(ratio, abs=2e-3)


def planned(
    dense: Path, folder: Path, pruning: PruningConfig, ratio: float, scores: np.ndarray[Any, Any] | None = None
) -> tuple[Groups, np.ndarray[Any, Any]]:
    """The groups of a model, and whether each stays; by default the first ones of every layer go first."""
    groups, total = read_groups(folder), read_structure(dense).parameters
    leaving = plan(groups, pruning, total, ratio, 0, fits=lambda _: True)
    return groups, keep(groups, np.arange(len(groups)) if scores is None else scores, leaving)


def test_every_layer_loses_as_many_and_its_own_of_least_importance(tmp_path: Path) -> None:
    dense, folder = prepare(tmp_path)
    scores = np.random.default_rng(1).random(len(read_groups(folder)))
    groups, kept = planned(dense, folder, PRUNING, 0.25, scores)
    gone = []
    for layer, kind in product(range(4), KINDS):
        members = np.flatnonzero((groups.layer == layer) & (groups.kind == kind))
        stay, leave = scores[members[kept[members]]], scores[members[~kept[members]]]
        assert leave.max() < stay.min()
        gone.append((layer, kind, len(leave)))
    assert len({(kind, count) for _, kind, count in gone}) == 2


@pytest.mark.parametrize(("architecture", "heads"), [("qwen3", 5), ("gemma2", 4)])
def test_as_many_heads_stay_as_a_stock_configuration_takes(tmp_path: Path, architecture: str, heads: int) -> None:
    """Five are the nearest to the ratio, but those of Gemma 2 have to divide the hidden size."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 96}
    dense, out = pruned_checkpoint(tmp_path, 0.17, PRUNING, architecture=architecture, **sizes)
    assert read_structure(out).layer.kv_heads == heads
    assert 1 - read_structure(out).parameters / read_structure(dense).parameters == pytest.approx(0.17, abs=5e-3)
    with torch.no_grad():
        assert load_model(out)(IDS).logits.isfinite().all()


def test_a_ratio_out_of_reach_names_the_largest_one(tmp_path: Path) -> None:
    dense, folder = prepare(tmp_path)
    with pytest.raises(
        InputError, match=r"pruning\.ratios: got 0\.9; allowed: at most 0\.\d{4} with min_channels 2, min_kv_heads 1"
    ):
        planned(dense, folder, PRUNING, 0.9)
    groups = read_groups(folder)
    left = 4 * int(groups.parameters[0]) + 8 * 96
    largest = (int(groups.parameters.sum()) - left) / read_structure(dense).parameters
    _, kept = planned(dense, folder, PRUNING, largest)
    assert kept.sum() == 4 * (1 + 2)


@pytest.mark.parametrize("width", [512, 500])
def test_kept_channels_are_a_multiple(tmp_path: Path, width: int) -> None:
    pruning = PruningConfig(channel_multiple=64, min_channels=65, kinds=("mlp",))
    sizes = {"hidden_size": 64, "intermediate_size": width, "head_dim": 16}
    total = read_structure(save_tiny_llama(tmp_path / "same", **sizes)).parameters
    ratio = 4 * (width - 320) * 3 * 64 / total
    _, out = pruned_checkpoint(tmp_path, ratio, pruning, **sizes)
    assert read_structure(out).layer.channels == 320
    with pytest.raises(InputError, match="at most"):  # the floor is a multiple, too
        planned(tmp_path / "dense", tmp_path / "groups", pruning, 4 * (width - 65) * 3 * 64 / total)


def test_a_layer_keeps_its_floors(tmp_path: Path) -> None:
    dense, folder = prepare(tmp_path, num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    groups, kept = planned(dense, folder, PruningConfig(min_kv_heads=7, min_channels=2), 0.3)
    assert [int((kept & (groups.layer == n) & (groups.kind == "attention")).sum()) for n in range(4)] == [7] * 4


def test_a_ratio_that_a_multiple_cannot_meet_names_the_nearest(tmp_path: Path) -> None:
    dense, folder = prepare(tmp_path, hidden_size=64, intermediate_size=512)
    pruning = PruningConfig(channel_multiple=128, kinds=("mlp",))
    with pytest.raises(
        InputError, match=r"got 0\.3; allowed: (0\.\d{4}), the nearest .* channel_multiple 128"
    ) as error:
        planned(dense, folder, pruning, 0.3)
    nearest = float(str(error.value).split("allowed: ")[1].split(",")[0])
    groups, kept = planned(dense, folder, pruning, nearest)
    given = groups.parameters[~kept].sum() / read_structure(dense).parameters
    assert given == pytest.approx(nearest, abs=1e-3)


def test_pruning_a_pruned_model_again_works(tmp_path: Path) -> None:
    _, once = pruned_checkpoint(tmp_path, 0.2, PRUNING)
    folder, twice = tmp_path / "groups2", tmp_path / "twice"
    folder.mkdir()
    twice.mkdir()
    build_graph(once, settings=None, work=Work(folder))
    groups = read_groups(folder)
    write_importance(folder, groups, np.random.default_rng(3).random(len(groups)), "random")
    prune(once, folder, folder, None, ratio=0.1, pruning=PRUNING, out=twice)
    ratio = 1 - read_structure(twice).parameters / read_structure(once).parameters
    assert ratio == pytest.approx(0.1, abs=8e-3)  # within a channel of every layer
    with torch.no_grad():
        assert torch.isfinite(load_model(twice)(IDS).logits).all()


def test_a_checkpoint_in_shards_holds_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = pruned_checkpoint(tmp_path / "whole", 0.2, PRUNING)
    monkeypatch.setattr("tailored_llama.models.writing._SHARD", 10_000)
    _, shards = pruned_checkpoint(tmp_path / "shards", 0.2, PRUNING)
    assert len(list(whole.glob("*.safetensors"))) == 1
    assert len(files := weight_files(shards)) > 3
    assert max(file.stat().st_size for file in files) < 40_000  # one tensor, the embedding, is larger than a shard
    with torch.no_grad():
        assert torch.equal(load_model(shards)(IDS).logits, load_model(whole)(IDS).logits)
        stock = AutoModelForCausalLM.from_pretrained(shards)
        assert torch.equal(stock(IDS).logits, load_model(whole)(IDS).logits)


def test_memory_holds_at_most_half_a_gigabyte_of_what_is_written(tmp_path: Path) -> None:
    """A model that is streamed, since it does not fit into memory, is written there too, a shard at a time."""
    shapes = {name: [128 * 2**20] for name in "abc"}  # 268 MB each
    writing.write_shards(tmp_path, shapes, torch.bfloat16, lambda name: torch.zeros(shapes[name], dtype=torch.bfloat16))
    assert max(file.stat().st_size for file in weight_files(tmp_path)) < 500e6


def mapped_bytes(file: Path) -> int:
    """Addresses of this process that are mappings of a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    spans = [[int(address, 16) for address in line[0].split("-")] for line in lines]
    return sum(stop - start for start, stop in spans)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mappings")
def test_surgery_needs_few_addresses_however_many_tensors_it_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, folder = prepare(tmp_path, num_hidden_layers=12)
    write_importance(folder, groups := read_groups(folder), np.arange(len(groups)), "random")
    out, mapped, save = tmp_path / "pruned", list[int](), writing.save_file

    def measure(*args: Any, **options: Any) -> None:
        mapped.append(mapped_bytes(dense / "model.safetensors"))
        save(*args, **options)

    monkeypatch.setattr(writing, "save_file", measure)
    out.mkdir()
    prune(dense, folder, folder, None, ratio=0.2, pruning=PRUNING, out=out)
    assert mapped
    assert max(mapped) < 2.5 * (dense / "model.safetensors").stat().st_size  # safetensors maps an opened file twice


def test_a_gemma_3_with_two_heads_in_its_first_layer_is_traced(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    """torch-pruning does not end on two heads beside norms of heads, which a pruned Gemma 3 may have."""
    model = save_tiny_llama(
        tmp_path / "gemma", architecture="gemma3_text", num_attention_heads=2, num_key_value_heads=1
    )
    stop = threading.Timer(60, lambda: os.kill(os.getpid(), signal.SIGINT))  # else the test would never end
    stop.start()
    try:
        assert build_graph(model, settings=None, work=Work(folder("graph"))) == {"groups": 4 * (1 + 24)}
    finally:
        stop.cancel()
