"""SmolLM2 in llama.cpp: the same tokens, and the embedded file again, byte for byte."""

from pathlib import Path

import numpy as np
import pytest

from llama_cpp import LlamaCpp, llama_cpp
from tailored_llama.config import BenchmarkConfig, ModelConfig, RunConfig
from tailored_llama.data import load_template, render
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.models import (
    EMBEDDED_MODELS,
    find_model,
    load_tokenizer,
    open_gguf,
    source_tokenizer,
    special_around,
)
from tailored_llama.serving import write_gguf

pytestmark = pytest.mark.real


def token_ids_differ(runtime: LlamaCpp, checkpoint: Path, texts: list[str]) -> list[str]:
    tokenizer = load_tokenizer(checkpoint)
    return [text for text in texts if runtime.tokens(text) != tokenizer(text)["input_ids"]]


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_the_special_tokens_of_an_embedded_model_are_those_of_its_tokenizer(name: str, quickstart: RunConfig) -> None:
    tokenizer = source_tokenizer(find_model(ModelConfig(source=name)), quickstart.store.downloads)
    assert special_around(tokenizer, "a") == EMBEDDED_MODELS[name].special


def test_the_embedded_file_comes_back_byte_for_byte_and_cuts_text_alike(
    smollm2: Path, quickstart: RunConfig, tmp_path: Path
) -> None:
    original = tmp_path / "original.gguf"
    EMBEDDED_MODELS[quickstart.model.source].write(quickstart.store.downloads, original, original.parent)
    write_gguf(smollm2, gguf_type="q4_1", out=tmp_path / "again.gguf")
    before, after = (
        {t.name: (t.tensor_type, np.asarray(t.data)) for t in open_gguf(file, "").tensors}
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
