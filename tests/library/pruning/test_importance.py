"""Importance of coupled groups: equal to the plain computation, criterion by criterion."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from helpers import save_tiny_llama
from tailored_llama.config import Work
from tailored_llama.errors import InputError
from tailored_llama.models import load_model
from tailored_llama.pruning import build_graph, importance, read_groups
from tailored_llama.pruning.groups import Groups, Owners, owners_of
from tailored_llama.pruning.importance import (
    draw_tokens,
    in_passes,
    magnitude_scores,
    taylor_first_scores,
    taylor_gate_scores,
)

IDS = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(3))
TWO_PASSES = 32  # tokens at a time, where samples may be taken apart
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "fused": {"architecture": "phi3", "pad_token_id": 0, "sliding_window": None, "resid_pdrop": 0.5},
    "soft-capped": {"architecture": "gemma2", "query_pre_attn_scalar": 8},
}


@pytest.fixture(autouse=True)
def few_positions_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 15 that are predicted in a sample take three turns."""
    monkeypatch.setattr(importance, "_POSITIONS", 6)


def prepare(tmp_path: Path, changes: dict[str, Any]) -> tuple[Path, Groups, Owners]:
    dense, folder = save_tiny_llama(tmp_path / "dense", noise=0.1, **changes), tmp_path / "groups"
    folder.mkdir()
    build_graph(dense, settings=None, work=Work(folder))
    return dense, read_groups(folder), owners_of(dense)


def full_gradients(dense: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and gradients of the mean loss, by parameter."""
    model = load_model(dense).requires_grad_(True)
    parameters = dict(model.named_parameters())
    mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for sample in IDS.split(1):
        model.zero_grad()
        model(sample, labels=sample).loss.backward()
        for name, p in parameters.items():
            assert p.grad is not None
            mean[name] += p.grad / len(IDS)
    return {name: p.detach() for name, p in parameters.items()}, mean


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_streamed_importance_equals_full_gradients(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense, groups, owners = prepare(tmp_path, changes)
    streamed = taylor_first_scores(load_model(dense), IDS, owners)
    weights, mean = full_gradients(dense)
    expected = np.zeros(len(groups))
    for name, (dim, owner) in owners.items():
        elements = (weights[name] * mean[name]).abs()
        sums = elements.movedim(dim, 0).reshape(len(owner), -1).sum(1).double().numpy()
        np.add.at(expected, owner[owner >= 0], sums[owner >= 0])
    np.testing.assert_allclose(streamed, expected, rtol=1e-5)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_gates_have_the_fisher_information_of_real_gates(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense, groups, owners = prepare(tmp_path, changes)
    streamed = taylor_gate_scores(load_model(dense), in_passes(IDS, TWO_PASSES), owners, seed=7)
    model, gates = load_model(dense), torch.ones(IDS.shape[1], len(groups), requires_grad=True)  # one at every token
    for name, (dim, own) in owners.items():
        if dim == 1:
            module, owner = model.get_submodule(name.removesuffix(".weight")), torch.from_numpy(own)
            module.register_forward_pre_hook(lambda module, given, owner=owner: (given[0] * gates[:, owner],))
    draws, expected = torch.Generator().manual_seed(7), np.zeros(len(groups))
    for sample in IDS.split(1):
        logits = model(sample).logits[0, :-1]
        loss = cross_entropy(logits, draw_tokens(logits.detach(), torch.rand(len(logits), 1, generator=draws)))
        expected += torch.autograd.grad(loss, gates)[0].square().sum(0).numpy() / (2 * len(IDS))
    np.testing.assert_allclose(streamed, expected, rtol=1e-5, atol=1e-7 * expected.max())


def test_tokens_are_drawn_as_often_as_the_model_thinks() -> None:
    chances = torch.tensor([0.5, 0.0, 0.3, 0.2])
    draws = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    found = draw_tokens(chances.log().expand(20_000, 4), draws).bincount(minlength=4)
    assert found[1] == 0
    torch.testing.assert_close(found / 20_000, chances, rtol=0, atol=0.015)


def test_memory_that_runs_out_where_all_samples_are_taken_at_once_is_explained(tmp_path: Path) -> None:
    dense, _, owners = prepare(tmp_path, {})
    model = load_model(dense)

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    model.model.layers[1].register_forward_pre_hook(full)
    with pytest.raises(InputError, match=r"^pruning.criterion: got 'taylor_first', which takes all 3 sequences"):
        taylor_first_scores(model, IDS, owners)
    with pytest.raises(torch.OutOfMemoryError):
        taylor_gate_scores(model, [IDS], owners)


def test_a_model_is_left_as_it_was(tmp_path: Path) -> None:
    dense, _, owners = prepare(tmp_path, {})
    model = load_model(dense)
    with torch.no_grad():
        before = model(IDS).logits
    taylor_first_scores(model, IDS, owners)
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


def test_magnitude_is_the_norm_of_all_weights_of_a_group(tmp_path: Path) -> None:
    dense, groups, owners = prepare(tmp_path, {})
    channel = int(np.flatnonzero((groups.layer == 2) & (groups.kind == "mlp") & (groups.index == 7))[0])
    weights = load_file(dense / "model.safetensors")
    prefix = "model.layers.2.mlp"
    members = [weights[f"{prefix}.{n}_proj.weight"][7] for n in ("gate", "up")]
    members.append(weights[f"{prefix}.down_proj.weight"][:, 7])
    norm = torch.cat(members).double().norm()
    assert magnitude_scores(dense, owners)[channel] == pytest.approx(float(norm), rel=1e-6)
