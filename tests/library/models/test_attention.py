"""Attention in padded batches, which GPUs use, and of short documents in bfloat16, equals the plain loop."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from helpers import save_tiny_llama
from tailored_llama.models import (
    Document,
    Header,
    attention,
    encode_header,
    load_model,
    packed_attention,
    packed_states,
)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Mistral (sliding window)": ("mistral", {"sliding_window": 9}),
    "Gemma 2 (soft-capping, windows)": (
        "gemma2",
        {"query_pre_attn_scalar": 8, "sliding_window": 9, "attn_logit_softcapping": 2.0},
    ),
    "Qwen3": ("qwen3", {}),
}
HEADER = range(40, 53)
PLAIN = [Document(range(5, 5 + length)) for length in (3, 17, 17, 1, 30, 8)]
BRANCHED = [
    *PLAIN,
    Document(range(60, 70), [[1, 2, 3], [4], [], [1, 9, 8, 7, 6]]),
    Document((), [[3, 1], [4, 1, 5]]),
    Document(range(90, 110), [[7] * 12]),
]
BLOCKS = [attention.Block(start, stop) for start, stop in pairwise((0, 3, 20, 21, 40))]
# Processors round differently: AMD's exceed 8 roundings of a float32.
ERRORS = {dtype: 50 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}

every_model = pytest.mark.parametrize(("architecture", "changes"), MODELS.values(), ids=MODELS.keys())
every_type = pytest.mark.parametrize("dtype", ERRORS, ids=["float32", "float64"])


def run(model: Any, documents: list[Document], header: range) -> dict[str, Tensor]:
    """The states of a packed row, and the gradients of a loss over them, the header's share included."""
    model.zero_grad()
    model.requires_grad_()
    positions = torch.arange(sum(map(len, documents)))
    with packed_attention(model):
        before = encode_header(model, header, 8)
        states = packed_states(model, documents, positions, before)
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    (states * weights).mean().backward()
    return {"states": states.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@every_model
@every_type
@pytest.mark.parametrize("documents", [PLAIN, BRANCHED], ids=["plain", "branches"])
@pytest.mark.parametrize("header", [range(0), HEADER], ids=["no header", "header"])
@pytest.mark.parametrize("elements", [2**23, 2000], ids=["one batch", "several batches"])
def test_padded_batches_equal_the_loop(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    changes: dict[str, Any],
    dtype: torch.dtype,
    documents: list[Document],
    header: range,
    elements: int,
) -> None:
    folder = save_tiny_llama(tmp_path / "dense", architecture=architecture, noise=0.1, **changes)
    model = load_model(folder).to(dtype)
    looped = run(model, documents, header)
    monkeypatch.setattr(attention, "looped_attention", attention.padded_attention)
    monkeypatch.setattr(attention, "_BATCH_ELEMENTS", elements)
    padded = run(model, documents, header)
    largest = max(float(t.abs().max()) for name, t in looped.items() if name != "states")
    scales = dict.fromkeys(looped, largest) | {"states": float(looped["states"].abs().max())}
    errors = {name: float((padded[name] - t).abs().max()) / scales[name] for name, t in looped.items()}
    assert max(errors.values()) < ERRORS[dtype], errors


def test_what_padding_takes_is_made_on_the_device_of_the_query_and_once_for_all_layers() -> None:
    calls: list[list[Tensor]] = []

    def attend(query: Tensor, own: attention.KeysValues, mask: Tensor | None) -> Tensor:
        calls.append([t for t in (query, *own, mask) if t is not None])
        return torch.empty_like(calls[-1][0])

    states, before = torch.empty(1, 4, 40, 8, device="meta"), torch.empty(1, 4, 5, 8, device="meta")
    row = attention.Row(BLOCKS, Header(5), *(torch.zeros(40, dtype=torch.int64) for _ in range(2)), 24)
    for _ in range(2):
        output = attention.padded_attention(states, (states, states), row, (before, before), 9, attend)
        assert output.shape == (1, 40, 4, 8)
        assert output.device.type == "meta"
    first, second = calls
    assert {t.device.type for t in first} == {"meta"}
    assert [tuple(t.shape) for t in first] == [(4, 4, 19, 8), (4, 4, 24, 8), (4, 4, 24, 8), (4, 1, 19, 24)]
    assert first[3] is second[3]


@pytest.mark.parametrize(
    ("device", "blocks", "expected"),
    [("cuda", BLOCKS, "padded"), ("cuda", BLOCKS[:1], "looped"), ("cpu", BLOCKS, "looped")],
)
def test_a_gpu_pads_several_documents_and_a_cpu_none(
    monkeypatch: pytest.MonkeyPatch, device: str, blocks: list[attention.Block], expected: str
) -> None:
    for name in ("padded", "looped"):
        monkeypatch.setattr(attention, f"{name}_attention", lambda *_, name=name: name)
    states = SimpleNamespace(shape=(1, 4, 40, 8), device=torch.device(device))
    row = attention.Row(blocks, Header(), torch.empty(0), torch.empty(0), 24)
    called = AttentionInterface()["tailored_packed"](
        SimpleNamespace(layer_idx=0), states, states, states, None, packed_row=row
    )
    assert called == (expected, None)


@pytest.mark.parametrize("documents", [PLAIN, BRANCHED], ids=["plain", "branches"])
@pytest.mark.parametrize("header", [range(0), HEADER], ids=["no header", "header"])
def test_short_documents_in_bfloat16_are_as_exact_as_sdpa(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: list[Document], header: range
) -> None:
    model = load_model(save_tiny_llama(tmp_path / "dense", noise=0.1)).bfloat16()
    short = run(model, documents, header)
    monkeypatch.setattr(attention, "_SHORT_ELEMENTS", 0)
    sdpa = run(model, documents, header)
    exact = run(model.float(), documents, header)
    assert any(not torch.equal(short[name], sdpa[name]) for name in sdpa)
    norms = {name: float(t.norm()) for name, t in exact.items()}
    errors = [sum(float((own[n].float() - exact[n]).norm()) / norms[n] for n in norms) for own in (short, sdpa)]
    assert errors[0] < 1.1 * errors[1]
