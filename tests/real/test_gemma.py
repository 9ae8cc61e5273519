"""Gemma 3 270M, dense and with fewer tokens and channels: from its wheels into llama.cpp and back."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from llama_cpp import llama_cpp, with_ggml_gelu
from real_models import dense, pruned
from tailored_llama.config import BenchmarkConfig, PerplexityConfig, PruningConfig, RunConfig
from tailored_llama.data import find_text, load_template, load_texts, render
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.models import EMBEDDED_MODELS, load_model, load_tokenizer, read_structure
from tailored_llama.pipeline import StoreExecutor, stages
from tailored_llama.pruning import CountSettings
from tailored_llama.serving import write_gguf
from tailored_llama.store import sha256_file

pytestmark = pytest.mark.real
GEMMA = dense("gemma-3-270m")
TOKENS = 32_768
WINDOW = 512  # tokens that 15 of the 18 layers look back on
ODD = [
    "  two spaces, 1234 and 5.6e-7,  99  numbers",
    "line\n\nbreaks\tand tabs \n x",
    "      six\n\n\n\n   \t\t code   [multimodal] ▁▁ ▁x",
    "Ünïcödé — 日本語 😀 … naïve café, 한국어 العربية हिन्दी",
    "👩‍👩‍👧‍👦 \u200b\ufeff \x01 𝔘𝔫𝔦",
    "<table><tr>x</tr></table> <b>bold</b> don't WE'VE",
    " " * 40 + "x\r\n" + "\n" * 40,
    "",
    " ",
]


@pytest.fixture(scope="module")
def gemma(models: StoreExecutor) -> Path:
    return models.open(GEMMA)


@pytest.fixture(scope="module")
def smaller(models: StoreExecutor, quickstart: RunConfig) -> Path:
    """Three fifths gone: seven of eight tokens, and channels by the size of their weights, alike in every layer."""
    counts = stages.tokens("counts", settings=CountSettings.of(quickstart), dense=GEMMA, prompts={})
    kinds = ("attention", "mlp", "vocabulary")
    pruning = PruningConfig(kinds=kinds, vocabulary=TOKENS)
    return models.open(pruned(GEMMA, 0.6, pruning, counts=counts))


@pytest.fixture(scope="module")
def texts(quickstart: RunConfig) -> list[str]:
    found = []
    for name in ("piqa", "arc_easy", "hellaswag", "boolq"):
        benchmark = BenchmarkConfig(name=name)
        for example in islice(load_examples(benchmark, "evaluation", quickstart.store.downloads), 100):
            prompt = render(benchmark, load_template("harness"), example)
            found.append(prompt.contexts[0] + prompt.continuations[0])
    return [*found, *ODD]


def test_the_parts_are_the_file_that_was_published(quickstart: RunConfig, tmp_path: Path) -> None:
    EMBEDDED_MODELS["gemma-3-270m"].write(quickstart.store.downloads, tmp_path / "model.gguf", tmp_path)
    assert sha256_file(tmp_path / "model.gguf") == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@pytest.mark.parametrize(("which", "length"), [("gemma", 64), ("smaller", WINDOW + 64)])
def test_llama_cpp_cuts_text_alike_and_computes_the_same(
    which: str,
    length: int,
    request: pytest.FixtureRequest,
    quickstart: RunConfig,
    texts: list[str],
    tmp_path: Path,
    full: bool,
) -> None:
    """In float32. A table of GELU in float16 turns differences of the seventh digit into some of the fourth."""
    if which == "gemma" and not full:
        pytest.skip("only with --full: what is special to Gemma is in the smaller one, too")
    checkpoint: Path = request.getfixturevalue(which)
    write_gguf(checkpoint, gguf_type="f32", out=tmp_path / "model.gguf")
    tokenizer, model = load_tokenizer(checkpoint), with_ggml_gelu(load_model(checkpoint))
    ids = tokenizer("\n".join(load_texts(find_text(PerplexityConfig()), quickstart.store.downloads)[:40]))["input_ids"]
    window, prompt = ids[:length], tokenizer("The capital of France is")["input_ids"]
    with torch.no_grad(), llama_cpp(tmp_path / "model.gguf", 2 * WINDOW) as runtime:
        assert [text for text in texts if runtime.tokens(text) != tokenizer(text)["input_ids"]] == []
        expected = model(torch.tensor([window])).logits[0]
        assert (runtime.logits(window) - expected).norm() < 2e-3 * expected.norm()
        written = runtime.greedy(prompt, 48)
        logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
        missed = logits.amax(-1) - logits[range(48), written]
        assert missed.max() < (0.01 if which == "gemma" else 0.1)  # the likeliest; the smaller model has near ties


def test_the_smaller_model_is_two_fifths_and_has_the_terms(gemma: Path, smaller: Path) -> None:
    structure = read_structure(smaller)
    assert (structure.size.vocab_size, structure.model_type) == (TOKENS, "gemma3_text")
    assert structure.parameters / read_structure(gemma).parameters == pytest.approx(0.4, abs=1e-3)
    for name in ("NOTICE", "NOTICE.md", "GEMMA_TERMS.html"):
        assert (smaller / name).read_bytes() == (gemma / name).read_bytes()
