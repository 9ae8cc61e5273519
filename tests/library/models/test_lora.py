"""Projections that are computed together equal PEFT's own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import save_tiny_llama
from tailored_llama.config import ExecutionConfig, TuningConfig
from tailored_llama.models import adapters, add_adapter, load_model

MODELS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "phi3": {"pad_token_id": 0, "sliding_window": None}}
IDS = torch.arange(5, 45)[None]


def run(model: Any, precision: str = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradients of all adapters as one vector."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(IDS).logits.float()
    logits.log_softmax(-1)[0, :-1].gather(1, IDS[0, 1:, None]).mean().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert {gradient.dtype for gradient in found} == {torch.float32}
    return logits.detach(), torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_joined_projections_are_as_exact_as_pefts_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, recompute: bool, dtype: str, precision: str
) -> None:
    folder = save_tiny_llama(tmp_path / "dense", architecture=architecture, noise=0.1, **MODELS[architecture])
    execution, training = ExecutionConfig(recompute_activations=recompute), TuningConfig(variant="rslora")

    def model(kind: str) -> Any:
        torch.manual_seed(0)
        return add_adapter(load_model(folder).to(getattr(torch, kind)), training, execution).train()

    joined = run(model(dtype), precision)
    together = run(model("float32"))
    monkeypatch.setattr(adapters, "join_projections", lambda _: None)
    own, exact = run(model(dtype), precision), run(model("float32"))
    for ours, theirs, right, alike in zip(joined, own, exact, together, strict=True):
        assert torch.equal(alike, right)  # in float32 nothing changes
        assert not torch.equal(ours, theirs)
        assert (ours - right).norm() < 1.25 * (theirs - right).norm()
