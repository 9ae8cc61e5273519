"""Reconstruction: the normal equations, what it must not change, and that it helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from helpers import prune, save_tiny_llama
from tailored_llama.config import PruningConfig, ReconstructionConfig, Work
from tailored_llama.data.calibration import CALIBRATION_SCHEMA
from tailored_llama.errors import InputError
from tailored_llama.models import load_model, read_config, read_structure
from tailored_llama.pruning import build_graph, read_groups
from tailored_llama.pruning.groups import read_slices, staying
from tailored_llama.pruning.importance import write_importance
from tailored_llama.pruning.layerwise import Text
from tailored_llama.pruning.reconstruction import reconstruct
from tailored_llama.store import write_table

IDS = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(5))
PRUNING = PruningConfig(shape="any", min_channels=2)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "fused": {"architecture": "phi3", "pad_token_id": 0, "sliding_window": None},
    "local and global layers": {"architecture": "gemma3_text", "query_pre_attn_scalar": 8, "sliding_window": 8},
    "norms on q and k": {"architecture": "qwen3"},
}


def prepare(tmp_path: Path, **changes: Any) -> tuple[Path, Path, Path]:
    """A dense model, its groups with random importances, and calibration sequences."""
    dense, groups, text = (
        save_tiny_llama(tmp_path / "dense", noise=0.1, **changes),
        tmp_path / "groups",
        tmp_path / "text",
    )
    groups.mkdir()
    text.mkdir()
    build_graph(dense, settings=None, work=Work(groups))
    found = read_groups(groups)
    write_importance(groups, found, np.random.default_rng(1).random(len(found)), "random")
    columns = {"input_ids": IDS.tolist(), "source": ["here"] * len(IDS), "row": range(len(IDS))}
    write_table(text / "calibration.parquet", columns, CALIBRATION_SCHEMA)
    return dense, groups, text


def pruned(tmp_path: Path, dense: Path, groups: Path, text: Path, method: Any, ratio: float = 0.2) -> Path:
    out = tmp_path / f"{method}-{ratio}"
    out.mkdir()
    fitted = ReconstructionConfig(method=method, ridge=0.01)
    prune(dense, groups, groups, text, ratio=ratio, pruning=PRUNING, reconstruction=fitted, out=out)
    return out


def kept_channels(out: Path) -> torch.Tensor:
    """Which MLP channels layer 1 keeps, bool [channels]."""
    plan = pd.read_parquet(out / "plan.parquet")
    return torch.tensor(plan[(plan.layer == 1) & (plan.kind == "mlp")].kept.to_numpy())


def distance(one: Path, other: Path) -> float:
    """Mean squared difference of the last hidden states on the calibration tokens."""
    with torch.no_grad():
        return float((load_model(one).model(IDS)[0] - load_model(other).model(IDS)[0]).square().mean())


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_a_static_fit_is_the_ridge_solution_on_dense_activations(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense, groups, text = prepare(tmp_path, **changes)
    out = pruned(tmp_path, dense, groups, text, "static")
    name = "model.layers.1.mlp.down_proj"
    kept = kept_channels(out)
    assert 0 < kept.sum() < len(kept)
    model, seen = load_model(dense), []
    model.get_submodule(name).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        model(IDS)
    inputs, weight = seen[0].flatten(0, 1).double(), model.get_parameter(f"{name}.weight").double()
    some = inputs[:, kept]
    gram = some.T @ some
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    target = weight @ inputs.T @ some + weight[:, kept] @ ridge
    expected = target @ torch.linalg.inv(gram + ridge)
    found = load_file(out / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_a_sequential_fit_corrects_what_the_layers_before_left(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense, groups, text = prepare(tmp_path, **changes)
    out = pruned(tmp_path, dense, groups, text, "sequential")
    kept = kept_channels(out)
    (stream, inputs, _), (wanted, _, outputs) = states(out), states(dense)
    weight = load_model(dense).get_parameter("model.layers.1.mlp.down_proj.weight").double()[:, kept]
    bias = load_model(dense).get_submodule("model.layers.1.mlp.down_proj").bias
    target = outputs - (0 if bias is None else bias.double())
    if "gemma3_text" not in changes.values():  # which norms the outputs before it adds them
        target = target + wanted - stream
    ridge = 0.01 * (gram := inputs.T @ inputs).diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    expected = (target.T @ inputs + weight @ ridge) @ torch.linalg.inv(gram + ridge)
    found = load_file(out / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_a_sequential_fit_gives_the_projections_before_what_they_gave(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense, groups, text = prepare(tmp_path, **changes)
    out = pruned(tmp_path, dense, groups, text, "sequential")
    kept = kept_channels(out)
    assert 0 < kept.sum() < len(kept)
    name = "gate_up_proj" if "phi3" in changes.values() else "up_proj"
    rows = kept.repeat(2 if "phi3" in changes.values() else 1)
    inputs, wanted = (given(one, f"model.layers.1.mlp.{name}") for one in (out, dense))
    weight = load_model(dense).get_parameter(f"model.layers.1.mlp.{name}.weight").double()[rows]
    ridge = 0.01 * (gram := inputs.T @ inputs).diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    expected = (weight @ wanted.T @ inputs + weight @ ridge) @ torch.linalg.inv(gram + ridge)
    found = load_file(out / "model.safetensors")[f"model.layers.1.mlp.{name}.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_a_sequential_fit_scales_each_channel_of_the_last_norm(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense, groups, text = prepare(tmp_path, **changes)
    out = pruned(tmp_path, dense, groups, text, "sequential")
    stream, norms = given(out, "model.norm"), [load_model(one).model.norm for one in (dense, out)]
    with torch.no_grad():
        wanted = norms[0](given(dense, "model.norm").float()).double()
        inputs, found = (norm(stream.float()).double() for norm in norms)
    ridge = 0.01 * (squares := inputs.square().sum(0)).mean()
    factors = ((inputs * wanted).sum(0) + ridge) / (squares + ridge)
    assert factors.min() < 0.99
    torch.testing.assert_close(found, inputs * factors, rtol=1e-3, atol=1e-4)


def given(checkpoint: Path, name: str) -> torch.Tensor:
    """What a module of a checkpoint is given on the calibration tokens, [tokens, width]."""
    model, seen = load_model(checkpoint), []
    model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(IDS)
    return seen[0].flatten(0, 1).double()


def states(checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The residual stream before layer 1's MLP, and the inputs and outputs of its down_proj, [tokens, width]."""
    model, seen = load_model(checkpoint), []
    layer = model.model.layers[1]
    norm = layer.pre_feedforward_layernorm if "gemma" in model.config.model_type else layer.post_attention_layernorm
    norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    layer.mlp.down_proj.register_forward_hook(lambda module, given, outputs: seen.extend([given[0], outputs]))
    with torch.no_grad():
        model(IDS)
    stream, inputs, outputs = (tensor.flatten(0, 1).double() for tensor in seen)
    return stream, inputs, outputs


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("method", ["static", "sequential"])
def test_where_nothing_is_removed_nothing_changes(tmp_path: Path, changes: dict[str, Any], method: Any) -> None:
    dense, groups, _ = prepare(tmp_path, **changes)
    shapes = {name: list(tensor.shape) for name, tensor in load_file(dense / "model.safetensors").items()}
    model, before = load_model(dense), load_file(dense / "model.safetensors")
    every = np.ones(len(read_groups(groups)), dtype=bool)
    for tensors in reconstruct(
        model, Text(IDS), staying(read_slices(groups, shapes), every), ReconstructionConfig(method=method, ridge=0.01)
    ):
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, before[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["static", "sequential", "bias"])
def test_fewer_tokens_at_a_time_fit_the_same(tmp_path: Path, method: Any) -> None:
    dense, groups, _ = prepare(tmp_path)
    shapes = {name: list(tensor.shape) for name, tensor in load_file(dense / "model.safetensors").items()}
    kept = np.random.default_rng(1).random(len(read_groups(groups))) > 0.3
    stays, config = staying(read_slices(groups, shapes), kept), ReconstructionConfig(method=method, ridge=0.01)
    whole, parts = (list(reconstruct(load_model(dense), Text(IDS, most), stays, config)) for most in (None, 64))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_a_fitted_model_is_closer_to_the_dense_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense, groups, text = prepare(tmp_path, **changes)
    found = {m: distance(dense, pruned(tmp_path, dense, groups, text, m)) for m in ("none", "static", "sequential")}
    assert found["static"] < 0.9 * found["none"]
    assert found["sequential"] < found["static"]  # on the very text they were fitted to


def test_a_bias_makes_up_for_the_mean_and_is_counted(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 512, "head_dim": 16}
    dense, groups, text = prepare(tmp_path, **sizes)
    out = pruned(tmp_path, dense, groups, text, "bias")
    ratio = 1 - read_structure(out).parameters / read_structure(dense).parameters
    assert ratio == pytest.approx(0.2, abs=1e-3)
    assert read_config(out)["attention_bias"] is read_config(out)["mlp_bias"] is True
    model, before = load_model(out), load_model(dense)
    seen: list[torch.Tensor] = []
    for one in (model, before):  # of layer 0, whose inputs are the same: only its attention comes first
        one.get_submodule("model.layers.0.self_attn.o_proj").register_forward_hook(lambda m, i, o: seen.append(o))
        with torch.no_grad():
            one(IDS)
    torch.testing.assert_close(seen[0].mean((0, 1)), seen[1].mean((0, 1)), rtol=0, atol=1e-5)


def test_an_architecture_without_biases_says_so(tmp_path: Path) -> None:
    dense, groups, text = prepare(tmp_path, architecture="qwen3")
    with pytest.raises(InputError, match=r"reconstruction\.method: got 'bias'; allowed for qwen3: none, static or seq"):
        pruned(tmp_path, dense, groups, text, "bias")


def test_a_second_step_counts_from_the_original(tmp_path: Path) -> None:
    dense, groups, text = prepare(tmp_path, hidden_size=64, intermediate_size=512, head_dim=16)
    first = pruned(tmp_path, dense, groups, text, "static", 0.15)
    graph, out = tmp_path / "groups-2", tmp_path / "second"
    graph.mkdir()
    out.mkdir()
    build_graph(first, settings=None, work=Work(graph))
    found = read_groups(graph)
    write_importance(graph, found, np.random.default_rng(2).random(len(found)), "random")
    original = read_structure(dense).size
    prune(first, graph, graph, None, ratio=0.3, pruning=PRUNING, out=out, original=dense)
    assert 1 - read_structure(out).parameters / original.parameters == pytest.approx(0.3, abs=1e-3)
    assert f"of {original.parameters:,} parameters are left (30." in (out / "README.md").read_text()
