"""The real model through the stages: it still speaks, has the size it should, and learns from real examples."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import CPU, load_and_render, tune
from llama_cpp import llama_cpp
from tailored_llama.config import BenchmarkConfig, PerplexityConfig, RunConfig, Work
from tailored_llama.data import find_text, load_texts
from tailored_llama.evaluation import PerplexitySettings, WrittenAnswer, generate, measure_perplexity, read_metrics
from tailored_llama.models import Layer, load_model, load_tokenizer, merge_adapter, read_structure
from tailored_llama.serving import write_gguf

pytestmark = pytest.mark.real
WINDOW = 512


def test_the_dense_model_is_smollm2(smollm2: Path) -> None:
    structure = read_structure(smollm2)
    assert structure.parameters == 134_515_008
    assert structure.layer == Layer(heads=9, kv_heads=3, channels=1536)
    assert (
        "Paris"
        in generate(load_model(smollm2), load_tokenizer(smollm2), ["The capital of France is"], WrittenAnswer(8))[0]
    )


def test_a_fifth_of_all_parameters_is_gone_and_the_model_still_predicts(
    smollm2: Path, pruned_smollm2: Path, quickstart: RunConfig, folder: Callable[[str], Path]
) -> None:
    before, after = read_structure(smollm2).parameters, read_structure(pruned_smollm2).parameters
    assert 1 - after / before == pytest.approx(0.2, abs=1e-3)
    perplexities, settings = [], PerplexitySettings.of(PerplexityConfig(tokens=1024))
    for name, checkpoint in (("dense", smollm2), ("pruned", pruned_smollm2)):
        out = folder(name)
        measure_perplexity(checkpoint, None, settings=settings, work=Work(out, CPU, quickstart.store.downloads))
        perplexities.append(read_metrics(out)["perplexity"])
    assert 10 < perplexities[0] < 40  # a wrong rope_theta or tokenizer shows here first
    assert perplexities[1] < 4 * perplexities[0]


def test_tuning_lowers_the_held_out_loss_and_the_merged_model_stands_alone(
    pruned_smollm2: Path, quickstart: RunConfig, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    benchmark, adapter, merged = BenchmarkConfig(name="arc_easy"), folder("adapter"), folder("merged")
    prompts = load_and_render(benchmark, tmp_path, split="train", shots=16, held_out=8)
    measured = tune(pruned_smollm2, prompts, quickstart.tuning.model_copy(update={"epochs": 2}), adapter)
    held = [v for v in pq.read_table(adapter / "log.parquet")["held_out_loss"].to_pylist() if v is not None]
    assert min(held) < held[0] - 0.1
    assert math.isfinite(measured["tokens_per_second"])
    merge_adapter(pruned_smollm2, adapter, out=merged)
    ids = load_tokenizer(merged)("The sky is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        attached = load_model(pruned_smollm2, adapter)(ids).logits
    torch.testing.assert_close(alone, attached, rtol=0, atol=1e-4)


def windows(checkpoint: Path, run: RunConfig, count: int) -> list[list[int]]:
    text = "\n".join(load_texts(find_text(PerplexityConfig()), run.store.downloads)[:40])
    ids = load_tokenizer(checkpoint)(text)["input_ids"]
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


def perplexity(logits: list[torch.Tensor], ids: list[list[int]]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(rows[:-1], torch.tensor(window[1:]))
        for rows, window in zip(logits, ids, strict=True)
    ]
    return math.exp(torch.stack(losses).mean())


def rounded_to_f16(model: Any) -> Any:
    """The model with matrices rounded as a file in f16 holds them."""
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.copy_(weights.half())
    return model


@pytest.mark.parametrize("pruned", ["pruned_smollm2", "halved_smollm2"])
def test_a_pruned_model_writes_and_predicts_the_same_in_llama_cpp(
    pruned: str, request: pytest.FixtureRequest, quickstart: RunConfig, tmp_path: Path, full: bool
) -> None:
    """In f16. The reference is rounded alike: in a halved model that alone can move perplexity by more than 0.1 %."""
    if pruned == "halved_smollm2" and not full:
        pytest.skip("only with --full")
    checkpoint: Path = request.getfixturevalue(pruned)
    write_gguf(checkpoint, gguf_type="f16", out=tmp_path / "model.gguf")
    model, ids = rounded_to_f16(load_model(checkpoint)), windows(checkpoint, quickstart, 4 if full else 1)
    prompt = load_tokenizer(checkpoint)("The capital of France is")["input_ids"]
    with torch.no_grad(), llama_cpp(tmp_path / "model.gguf", WINDOW) as runtime:
        written = runtime.greedy(prompt, 48)
        logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == written
        theirs = perplexity([runtime.logits(window) for window in ids], ids)
        ours = perplexity([model(torch.tensor([window])).logits[0] for window in ids], ids)
    assert theirs == pytest.approx(ours, rel=1e-3)
