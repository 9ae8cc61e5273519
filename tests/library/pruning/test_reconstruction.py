"""Reconstruction: the normal equations, what it must not change, and that it helps."""

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
from tailored_llama.models import load_model
from tailored_llama.pruning import build_graph, read_groups
from tailored_llama.pruning.groups import owners_of, staying
from tailored_llama.pruning.importance import in_passes, write_importance
from tailored_llama.pruning.reconstruction import reconstruct
from tailored_llama.store import write_table

IDS = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(5))
PRUNING = PruningConfig(min_channels=2)
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


def pruned(
    tmp_path: Path, dense: Path, groups: Path, text: Path, method: Any, ratio: float = 0.2, pruning: Any = PRUNING
) -> Path:
    out = tmp_path / f"{method}-{ratio}"
    out.mkdir()
    fitted = ReconstructionConfig(method=method, ridge=0.01)
    prune(dense, groups, groups, text, ratio=ratio, pruning=pruning, reconstruction=fitted, out=out)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_projections_whose_inputs_all_stay_keep_their_bytes(
    tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    dense, groups, text = prepare(tmp_path, **changes)
    load_model(dense).to(dtype).save_pretrained(dense)
    out = pruned(tmp_path, dense, groups, text, "static", 0.1, PruningConfig(kinds=("mlp",), min_channels=2))
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, out))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all("mlp" in name for name in changed)


def test_fewer_tokens_at_a_time_fit_the_same(tmp_path: Path) -> None:
    dense, groups, _ = prepare(tmp_path)
    kept = np.random.default_rng(1).random(len(read_groups(groups))) > 0.3
    stays = staying(owners_of(dense), kept)
    batches = (in_passes(IDS, most, even=True) for most in (None, 64))
    whole, parts = (list(reconstruct(load_model(dense), each, stays, 0.01)) for each in batches)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_a_fitted_model_is_closer_to_the_dense_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense, groups, text = prepare(tmp_path, **changes)
    found = {m: distance(dense, pruned(tmp_path, dense, groups, text, m, 0.25)) for m in ("none", "static")}
    assert found["static"] < 0.9 * found["none"]
