"""Tuning: learns, repeats, stops, and writes adapters that PEFT loads."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from helpers import save_tiny_llama, write_own_benchmark
from tailored_llama import tuning
from tailored_llama.benchmarks import load_benchmark
from tailored_llama.config import BenchmarkConfig, ExecutionConfig, TuningConfig
from tailored_llama.models import load, load_tokenizer
from tailored_llama.prompts import Prompt, read_prompts, render_prompts
from tailored_llama.tokens import encode_pair
from tailored_llama.tuning import learning_rate

CPU = ExecutionConfig(device="cpu")
QUICK = TuningConfig(epochs=3, learning_rate=2e-2, batch_size=4, dropout=0.1)


@pytest.fixture
def prompts(folder: Callable[[str], Path]) -> Path:
    benchmark = BenchmarkConfig(**write_own_benchmark(folder("data")))
    examples, out = folder("examples"), folder("prompts")
    load_benchmark(benchmark, "", examples)
    render_prompts(examples, benchmark, "train", "harness", out, shots=8, held_out=8)
    return out


def log_of(adapter: Path) -> dict[str, list[Any]]:
    return dict(pq.read_table(adapter / "log.parquet").to_pydict())


def test_tuning_lowers_the_loss_and_peft_loads_the_adapter(
    tiny: Path, prompts: Path, folder: Callable[[str], Path]
) -> None:
    out = folder("adapter")
    tuning.tune(tiny, prompts, QUICK, 0, out, CPU)
    held = [loss for loss in log_of(out)["held_out_loss"] if loss is not None]
    assert min(held[1:]) < 0.8 * held[0]
    assert held_out_loss(tiny, out, prompts) == pytest.approx(min(held), abs=1e-4)


def test_fused_projections_get_the_adapters_of_their_parts(prompts: Path, folder: Callable[[str], Path]) -> None:
    sizes = {"pad_token_id": 0, "sliding_window": None}
    dense, out = save_tiny_llama(folder("phi"), architecture="phi3", **sizes), folder("adapter")
    tuning.tune(dense, prompts, QUICK, 0, out, CPU)
    held = [loss for loss in log_of(out)["held_out_loss"] if loss is not None]
    assert min(held[1:]) < held[0]
    tuned = {name.split(".")[-3] for name in load_file(out / "adapter_model.safetensors")}
    assert tuned == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def held_out_loss(checkpoint: Path, adapter: Path, prompts: Path) -> float:
    """The held-out loss of a saved adapter, by plain forward passes over PEFT's own loader."""
    tuned = PeftModel.from_pretrained(load(checkpoint), adapter).eval()
    tokenizer, losses = load_tokenizer(checkpoint), []
    for prompt in read_prompts(prompts, "held_out"):
        before, after = encode_pair(tokenizer, prompt.contexts[prompt.answer], prompt.continuations[prompt.answer])
        with torch.no_grad():
            logprobs = tuned(torch.tensor([before + after])).logits[0].log_softmax(-1)
        losses.append(-sum(float(logprobs[len(before) + i - 1, t]) for i, t in enumerate(after)) / len(after))
    return sum(losses) / len(losses)


def test_the_same_seed_gives_the_same_bytes(tiny: Path, prompts: Path, folder: Callable[[str], Path]) -> None:
    first, second, other = folder("first"), folder("second"), folder("other")
    for out, seed in ((first, 0), (second, 0), (other, 1)):
        tuning.tune(tiny, prompts, QUICK, seed, out, CPU)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    weights = [load_file(out / "adapter_model.safetensors") for out in (first, other)]
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_micro_batches_change_nothing_but_memory(tiny: Path, prompts: Path, folder: Callable[[str], Path]) -> None:
    without_dropout = QUICK.model_copy(update={"dropout": 0.0})
    for name, budget in (("small", 64), ("large", 4096)):
        split = without_dropout.model_copy(update={"micro_batch_tokens": budget})
        tuning.tune(tiny, prompts, split, 0, folder(name), CPU)
    small, large = (log_of(prompts.parent / name)["loss"] for name in ("small", "large"))
    assert small[1:] == pytest.approx(large[1:], rel=1e-3)


def test_tuning_stops_when_the_held_out_loss_no_longer_falls(
    tiny: Path, prompts: Path, folder: Callable[[str], Path]
) -> None:
    out = folder("adapter")
    wild = TuningConfig(epochs=20, learning_rate=1.0, patience=2, warmup=0)  # soon every step makes it worse
    tuning.tune(tiny, prompts, wild, 0, out, CPU)
    log = log_of(out)
    held = [loss for loss in log["held_out_loss"] if loss is not None]
    assert log["epoch"][-1] == held.index(min(held)) + 2
    assert held[-1] > min(held)
    assert held_out_loss(tiny, out, prompts) == pytest.approx(min(held), abs=1e-3)  # the best one is kept


def test_a_loss_that_is_not_a_number_stops_with_the_step(
    tiny: Path, prompts: Path, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tuning._loss
    calls = iter(range(1000))

    def broken(model: Any, batch: Any) -> Any:
        return real(model, batch) * (float("nan") if next(calls) >= 6 else 1)

    monkeypatch.setattr(tuning, "_loss", broken)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d+ of 6"):
        tuning.tune(tiny, prompts, QUICK, 0, folder("adapter"), CPU)


def test_the_learning_rate_warms_up_then_falls() -> None:
    config = TuningConfig(learning_rate=1.0, warmup=0.2)
    rates = [learning_rate(step, 10, config) for step in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in zip(rates[2:], rates[3:], strict=False))  # noqa: RUF007
    assert math.isclose(learning_rate(10, 10, config.model_copy(update={"schedule": "constant"})), 1.0)


def test_a_continuation_longer_than_the_context_trains_on_its_end(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    prompt = Prompt(0, ("short",), (" " + "x" * 300,), 0, (300,))
    document, wanted = tuning._sample(tokenizer, prompt, 256)
    assert (len(document), len(wanted)) == (256, 256)
