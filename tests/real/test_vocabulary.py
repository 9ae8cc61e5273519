"""SmolLM2 with a third of its tokens: the same words, the same predictions of them, and the same ids in llama.cpp."""

from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_cpp import llama_cpp
from real_models import dense, pruned
from tailored_llama.config import BenchmarkConfig, PerplexityConfig, PruningConfig, RunConfig
from tailored_llama.data import find_text, load_template, load_texts, render
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.models import load_model, load_tokenizer, read_id_table, read_structure
from tailored_llama.pipeline import StoreExecutor, stages
from tailored_llama.pruning import CountSettings
from tailored_llama.serving import write_gguf

pytestmark = pytest.mark.real
SMOLLM2 = dense("smollm2-135m-instruct")
TOKENS = 16_384


@pytest.fixture(scope="module")
def trimmed(models: StoreExecutor, quickstart: RunConfig, smollm2: Path) -> Path:
    """Only tokens are removed, by the calibration text alone."""
    counts = stages.tokens("counts", settings=CountSettings.of(quickstart), dense=SMOLLM2, prompts={})
    size = read_structure(smollm2).size
    ratio = (size.vocab_size - TOKENS) * size.row / size.parameters
    pruning = PruningConfig(kinds=("attention", "mlp", "vocabulary"), vocabulary=TOKENS)
    made = pruned(SMOLLM2, ratio, pruning, counts=counts)
    facts = models.artifacts.manifest(models.result(made)).measured
    assert facts["body_ratio"] == 0
    assert 0.95 < facts["tokens_whole"] < 0.96
    return models.open(made)


@pytest.fixture(scope="module")
def texts(quickstart: RunConfig) -> list[str]:
    """Prompts of three benchmarks, passages, and what no benchmark has."""
    found = ["Größe 3,14 — naïve café, 日本語, 🤗🏽 and \u200b\n\n\tx  y ", "def f(x):\n    return {x: [1, 22, 333]}"]
    for name in ("arc_easy", "hellaswag", "piqa"):
        benchmark = BenchmarkConfig(name=name)
        examples = load_examples(benchmark, "evaluation", quickstart.store.downloads)
        for example in islice(examples, 0, None, max(1, len(examples) // 100)):
            prompt = render(benchmark, load_template("harness"), example)
            found += [c + a for c, a in zip(prompt.contexts, prompt.continuations, strict=True)]
    return found + load_texts(find_text(PerplexityConfig()), quickstart.store.downloads)[:100]


def test_every_text_is_written_and_those_of_kept_tokens_alike(texts: list[str], smollm2: Path, trimmed: Path) -> None:
    before, after, table = load_tokenizer(smollm2), load_tokenizer(trimmed), read_id_table(trimmed)
    assert table
    alike = other = 0
    for text in texts:
        assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])
    for text in chain.from_iterable(text.split(". ") for text in texts):
        ids, own = before(text)["input_ids"], after(text)["input_ids"]
        if table.kept.issuperset(ids):
            assert own == [table.pieces[index][0] for index in ids], text
            alike += 1
        else:
            other += 1
    assert min(alike, other) > 100
    chat = [{"role": "user", "content": "What is water made of?"}]
    assert after.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)
    assert after.eos_token == before.eos_token


def test_kept_tokens_have_the_dense_model_s_logits(smollm2: Path, trimmed: Path) -> None:
    table = read_id_table(trimmed)
    assert table
    ids = load_tokenizer(smollm2)("The capital of France is the city of")["input_ids"]
    own = load_tokenizer(trimmed)("The capital of France is the city of")["input_ids"]
    with torch.no_grad():
        dense = load_model(smollm2)(torch.tensor([ids])).logits[..., sorted(table.kept)]
        found = load_model(trimmed)(torch.tensor([own])).logits
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-3)


def test_llama_cpp_cuts_text_alike(texts: list[str], trimmed: Path, tmp_path: Path) -> None:
    write_gguf(trimmed, gguf_type="f16", out=tmp_path / "model.gguf")
    tokenizer = load_tokenizer(trimmed)
    with llama_cpp(tmp_path / "model.gguf") as runtime:
        assert runtime.model.n_vocab == TOKENS
        for text in texts:
            assert runtime.tokens(text) == tokenizer(text)["input_ids"], text
        ids = tokenizer("The capital of France is")["input_ids"]
        written = runtime.greedy(ids, 3)
    assert tokenizer.decode(written).startswith(" Paris")
    assert np.all(np.array(written) < TOKENS)
