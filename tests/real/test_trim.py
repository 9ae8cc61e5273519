"""SmolLM2 and Gemma 3 with fewer tokens, trimmed as files: the same logits to the bit, and transformers' own ids."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch

from llama_cpp import llama_cpp
from tailored_llama.config import BenchmarkConfig, PerplexityConfig, RunConfig
from tailored_llama.data import find_text, load_template, load_texts, render
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.models import EMBEDDED_MODELS, load_gguf_tokenizer, load_tokenizer, open_gguf, trim_tokenizer
from tailored_llama.serving import trim_gguf

pytestmark = pytest.mark.real

ODD = [
    "Größe 3,14 — naïve café, 日本語, 🤗🏽 and \u200b\n\n\tx  y ",
    "def f(x):\n    return {x: [1, 22, 333]}",
    "Hello,  world!\n\n\tTabs and   spaces ",
    " leading",
    "\n\n\n\n    12345678 99.5e-7",
    "e\u0301 \u0130stanbul ﬁ ½ \ufeff\u00a0x",
    "नमस्ते दुनिया; Привет; שלום; สวัสดี; 안녕하세요",
    "\x00\x01 \x7f",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]
TEXT = "The capital of France is the city of Paris, and water boils at 100 degrees."
KEPT = {"smollm2-135m-instruct": 28_672, "gemma-3-270m": 52_736}


def texts(run: RunConfig) -> list[str]:
    """Prompts of three benchmarks, passages, and what no benchmark has."""
    found = list(ODD)
    for name in ("arc_easy", "hellaswag", "piqa"):
        benchmark = BenchmarkConfig(name=name)
        examples = load_examples(benchmark, "evaluation", run.store.downloads)
        for example in islice(examples, 0, None, max(1, len(examples) // 60)):
            prompt = render(benchmark, load_template("harness"), example)
            found += [c + a for c, a in zip(prompt.contexts, prompt.continuations, strict=True)]
    return found + load_texts(find_text(PerplexityConfig()), run.store.downloads)[:100]


@dataclass(frozen=True)
class Files:
    dense: Path
    small: Path
    kept: list[int]  # the ids, in the dense file, of the small file's tokens


@pytest.fixture(scope="module", params=KEPT)
def files(request: pytest.FixtureRequest, quickstart: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder, downloads = tmp_path_factory.mktemp("trimmed"), quickstart.store.downloads
    dense, small = folder / "dense.gguf", folder / "small.gguf"
    EMBEDDED_MODELS[request.param].write(downloads, dense, dense.parent)
    counted = [*load_texts(find_text(PerplexityConfig()), downloads)[100:1100], TEXT]
    trimmed = trim_gguf(dense, counted, KEPT[request.param], small)
    assert trimmed.tokens[1] == KEPT[request.param]
    assert trimmed.whole > 0.999
    before, after = (open_gguf(file, "").fields["tokenizer.ggml.tokens"].contents() for file in (dense, small))
    ids = {text: index for index, text in enumerate(before)}
    return Files(dense, small, [ids[text] for text in after])


def test_logits_of_kept_tokens_are_equal_to_the_bit(files: Files) -> None:
    new = {old: index for index, old in enumerate(files.kept)}
    with llama_cpp(files.dense) as whole, llama_cpp(files.small) as part:
        ids = whole.tokens(TEXT)
        assert part.tokens(TEXT) == [new[index] for index in ids]
        own = part.logits([new[index] for index in ids])
        assert torch.equal(own, whole.logits(ids)[:, files.kept])


def test_ids_are_those_of_the_trimmed_tokenizer_in_transformers(
    files: Files, quickstart: RunConfig, tmp_path: Path
) -> None:
    """The tokenizer is trimmed apart from the file, as that of a checkpoint."""
    tokenizer = load_gguf_tokenizer(files.dense, source := open_gguf(files.dense, ""), "")
    tokenizer.save_pretrained(dense := tmp_path / "dense")
    rows = len(source.fields["tokenizer.ggml.tokens"].data)
    (dense / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
    (trimmed := tmp_path / "trimmed").mkdir()
    trim_tokenizer(dense, files.kept, [0.0] * rows, trimmed)
    before, after = load_tokenizer(dense), load_tokenizer(trimmed)
    new = {old: index for index, old in enumerate(files.kept)}
    same, other = 0, 0
    with llama_cpp(files.dense, 2048) as whole, llama_cpp(files.small, 2048) as part:
        for text in texts(quickstart):
            ids = part.tokens(text)
            assert ids == after(text)["input_ids"], text
            old = whole.tokens(text)
            assert old == before(text)["input_ids"], text
            if new.keys() >= set(old):
                assert ids == [new[index] for index in old], text
                same += 1
            else:
                other += 1
    assert min(same, other) > 5
