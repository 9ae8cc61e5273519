"""Pruning: groups, importance, plans, and surgery that changes nothing it should not."""

import json
import os
import signal
import threading
from collections.abc import Callable
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
from tailored_llama.models import Layer, layout_config, load_model, read_config, read_structure, weight_files, writing
from tailored_llama.pruning import build_graph, read_groups
from tailored_llama.pruning.groups import read_owners
from tailored_llama.pruning.importance import write_importance
from tailored_llama.pruning.plan import plan

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
    for name, (_, owner) in read_owners(folder, shapes).items():
        assert (owner >= 0).all(), name
        np.add.at(counted, owner, int(np.prod(shapes[name])) // len(owner))
    assert (counted == groups.parameters).all()


def test_a_group_of_grouped_query_attention_holds_its_own_query_heads(tmp_path: Path) -> None:
    dense, folder = prepare(tmp_path)
    groups = read_groups(folder)
    second = int(np.flatnonzero((groups.layer == 1) & (groups.kind == "attention") & (groups.index == 1))[0])
    owned = {
        (name.split(".")[-2], dim): np.flatnonzero(owner == second).tolist()
        for name, (dim, owner) in read_owners(folder, shapes_of(dense)).items()
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


UNIFORM = PruningConfig(shape="stock", min_channels=2)
LAYERED = PruningConfig(shape="stock", protect_first=1, min_channels=2)


@pytest.mark.parametrize(
    ("pruning", "changes", "kind"),
    [
        (UNIFORM, {}, "llama"),
        (UNIFORM, {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 30, "head_dim": 6}, "mistral"),
        (LAYERED, {}, "tailored_llama"),
    ],
)
def test_a_saved_checkpoint_reloads_with_equal_logits(
    tmp_path: Path, pruning: PruningConfig, changes: dict[str, Any], kind: str
) -> None:
    _, out = pruned_checkpoint(tmp_path, 0.2, pruning, **changes)
    assert read_config(out)["model_type"] == kind
    first = AutoModelForCausalLM.from_pretrained(out)
    again = tmp_path / "again"
    first.save_pretrained(again)
    second = AutoModelForCausalLM.from_pretrained(again)
    with torch.no_grad():
        assert torch.equal(first(IDS).logits, second(IDS).logits)
    assert str(tmp_path) not in (again / "config.json").read_text() + (out / "config.json").read_text()


@pytest.mark.parametrize("pruning", [UNIFORM, LAYERED], ids=["uniform", "per-layer"])
def test_generation_is_the_same_with_and_without_the_cache(tmp_path: Path, pruning: PruningConfig) -> None:
    _, out = pruned_checkpoint(tmp_path, 0.2, pruning)
    model = load_model(out)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    cached, plain = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    assert cached.shape == (1, IDS.shape[1] + 12)


@pytest.mark.parametrize("shape", ["stock", "any"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_the_saved_model_has_the_asked_ratio_of_all_parameters(tmp_path: Path, shape: Any, ratio: float) -> None:
    """Within one MLP channel of every layer: on this model a channel is 0.4 % of all parameters, on 7B 0.0002 %."""
    pruning = PruningConfig(shape=shape, min_channels=2)
    sizes = {"hidden_size": 64, "intermediate_size": 512, "head_dim": 16}
    dense, out = pruned_checkpoint(tmp_path, ratio, pruning, **sizes)
    before, after = read_structure(dense).parameters, read_structure(out).parameters
    assert after == sum(p.numel() for p in load_model(out).parameters())
    assert 1 - after / before == pytest.approx(ratio, abs=1e-3 if shape == "any" else 2e-3)


def test_uniform_plans_keep_equal_layers_equal_and_protected_layers_whole(tmp_path: Path) -> None:
    pruning = PruningConfig(shape="stock", protect_first=1, protect_last=1, min_channels=2)
    dense, out = pruned_checkpoint(tmp_path, 0.2, pruning)
    layers, before = read_structure(out).layers, read_structure(dense).layers
    assert layers[0] == before[0]
    assert layers[3] == before[3]
    assert layers[1] == layers[2] != before[1]


def test_global_plans_remove_the_least_important_group_first(tmp_path: Path) -> None:
    dense, folder = prepare(tmp_path)
    groups = read_groups(folder)
    scores = np.where(groups.kind == "mlp", 1.0, 100.0) * groups.parameters
    scores[groups.layer == 2] *= 0.1
    total = read_structure(dense).parameters
    kept = plan(groups, scores, PruningConfig(shape="any", min_channels=2), total, 0.05)
    assert set(groups.layer[~kept]) == {2}
    assert set(groups.kind[~kept]) == {"mlp"}


@pytest.mark.parametrize(("channel", "kind"), [(1.1, "attention"), (0.9, "mlp")])
def test_a_global_plan_weighs_attention_against_channels(tmp_path: Path, channel: float, kind: str) -> None:
    dense, folder = prepare(tmp_path)
    groups, total = read_groups(folder), read_structure(dense).parameters
    scores = np.where(groups.kind == "mlp", channel, 1.0) * groups.parameters
    ratio = 2 * groups.parameters[groups.kind == "attention"].max() / total
    kept = plan(groups, scores, PruningConfig(shape="any", min_channels=2), total, ratio)
    assert set(groups.kind[~kept]) == {kind}


def test_a_ratio_out_of_reach_names_the_largest_one(tmp_path: Path) -> None:
    dense, folder = prepare(tmp_path)
    groups, total = read_groups(folder), read_structure(dense).parameters
    with pytest.raises(
        InputError, match=r"pruning\.ratios: got 0\.9; allowed: at most 0\.\d{4} with protect_first 0.*min_kv_heads 1"
    ):
        plan(groups, np.ones(len(groups)), PruningConfig(shape="any", min_channels=2), total, 0.9)
    largest = (int(groups.parameters.sum()) - 4 * int(groups.parameters[0]) - 8 * 96) / total
    kept = plan(groups, np.ones(len(groups)), PruningConfig(shape="any", min_channels=2), total, largest)
    assert kept.sum() == 4 * (1 + 2)


@pytest.mark.parametrize("width", [512, 500])
def test_kept_channels_are_a_multiple(tmp_path: Path, width: int) -> None:
    pruning = PruningConfig(shape="any", channel_multiple=64, min_channels=65, kinds=("mlp",))
    sizes = {"hidden_size": 64, "intermediate_size": width, "head_dim": 16}
    total = read_structure(save_tiny_llama(tmp_path / "same", **sizes)).parameters
    ratio = (4 * (width % 64) + 10 * 64) * 3 * 64 / total  # what is above a multiple goes first, in every layer
    dense, out = pruned_checkpoint(tmp_path, ratio, pruning, **sizes)
    assert 1 - read_structure(out).parameters / read_structure(dense).parameters == pytest.approx(ratio, abs=1e-6)
    kept = {layer.channels for layer in read_structure(out).layers}
    assert len(kept) > 1
    assert all(channels == width or channels % 64 == 0 for channels in kept)
    assert min(kept) >= 128


def test_blocks_of_channels_go_by_their_sum(tmp_path: Path) -> None:
    """With a multiple, one precious channel does not save a layer's worthless ones."""
    dense, folder = prepare(tmp_path, hidden_size=64, intermediate_size=512)
    groups, total = read_groups(folder), read_structure(dense).parameters
    mlp = groups.kind == "mlp"
    scores = np.where(mlp, 1.0, 1e6)
    scores[mlp & (groups.layer == 1)] = 0.1
    scores[np.flatnonzero(mlp & (groups.layer == 1))[::100]] = 50.0
    ratio = 256 * 3 * 64 / total
    kept = plan(groups, scores, PruningConfig(shape="any", channel_multiple=64), total, ratio)
    assert (~kept & (groups.layer == 1)).sum() == (~kept).sum() == 256
    assert kept[scores == 50.0].all()


def test_a_layer_keeps_its_floors(tmp_path: Path) -> None:
    dense, folder = prepare(tmp_path, num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    groups, total = read_groups(folder), read_structure(dense).parameters
    scores = np.where(groups.kind == "attention", 0.0, 1.0)
    kept = plan(groups, scores, PruningConfig(shape="any", min_kv_heads=3, min_channels=2), total, 0.3)
    assert [int((kept & (groups.layer == n) & (groups.kind == "attention")).sum()) for n in range(4)] == [3] * 4


def test_a_ratio_that_a_multiple_cannot_meet_names_the_nearest(tmp_path: Path) -> None:
    dense, folder = prepare(tmp_path, hidden_size=64, intermediate_size=512)
    groups, total = read_groups(folder), read_structure(dense).parameters
    pruning = PruningConfig(shape="stock", channel_multiple=128, kinds=("mlp",))
    with pytest.raises(
        InputError, match=r"got 0\.3; allowed: (0\.\d{4}), the nearest .* channel_multiple 128"
    ) as error:
        plan(groups, np.arange(len(groups)), pruning, total, 0.3)
    nearest = float(str(error.value).split("allowed: ")[1].split(",")[0])
    kept = plan(groups, np.arange(len(groups)), pruning, total, nearest)
    assert groups.parameters[~kept].sum() / total == pytest.approx(nearest, abs=1e-3)


def test_a_layout_states_what_differs(tmp_path: Path) -> None:
    dense = read_config(save_tiny_llama(tmp_path / "dense"))
    config = layout_config(dense, (Layer(4, 2, 24), Layer(2, 1, 10), Layer(4, 2, 24), Layer(4, 2, 8)))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["per_layer_config"]["1"] == {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 10,
    }


def test_pruning_a_pruned_model_again_works(tmp_path: Path) -> None:
    _, once = pruned_checkpoint(tmp_path, 0.2, LAYERED)
    folder, twice = tmp_path / "groups2", tmp_path / "twice"
    folder.mkdir()
    twice.mkdir()
    build_graph(once, settings=None, work=Work(folder))
    groups = read_groups(folder)
    write_importance(folder, groups, np.random.default_rng(3).random(len(groups)), "random")
    prune(once, folder, folder, None, ratio=0.1, pruning=PruningConfig(shape="any", min_channels=2), out=twice)
    ratio = 1 - read_structure(twice).parameters / read_structure(once).parameters
    assert ratio == pytest.approx(0.1, abs=4e-3)
    with torch.no_grad():
        assert torch.isfinite(load_model(twice)(IDS).logits).all()


def test_a_checkpoint_in_shards_holds_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = pruned_checkpoint(tmp_path / "whole", 0.2, LAYERED)
    monkeypatch.setattr("tailored_llama.models.writing._SHARD", 10_000)
    _, shards = pruned_checkpoint(tmp_path / "shards", 0.2, LAYERED)
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
    prune(dense, folder, folder, None, ratio=0.2, pruning=UNIFORM, out=out)
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
