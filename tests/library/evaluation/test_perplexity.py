"""Perplexity: lm-evaluation-harness's windows, every token scored once."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows

from tailored_llama.config import ExecutionConfig, PerplexityConfig, Work
from tailored_llama.errors import InputError
from tailored_llama.evaluation import PerplexitySettings, measure_perplexity
from tailored_llama.evaluation.perplexity import rolling_windows
from tailored_llama.models import load_model, load_tokenizer

CPU = ExecutionConfig(device="cpu", batch_tokens=64)
TEXT = "The quick brown fox jumps over the lazy dog.\n\nTwice  it does."


@pytest.mark.parametrize("length", [1, 5, 16, 17, 40, 64, 71])
@pytest.mark.parametrize("window", [16, 64])
def test_windows_are_the_harness_rolling_windows(length: int, window: int) -> None:
    tokens = list(range(100, 100 + length))
    inputs = [0, *tokens[:-1]]
    ours = [(inputs[start:stop], tokens[first:stop]) for start, first, stop in rolling_windows(length, window)]
    theirs = get_rolling_token_windows(tokens, 0, window, 1)
    assert ours == list(theirs)


def measure(tiny: Path, folder: Callable[[str], Path], text: str = TEXT, **settings: object) -> dict[str, float]:
    source, out = folder("data") / "text.txt", folder("out")
    source.write_text(text)
    config = PerplexityConfig(**({"source": str(source)} | settings))
    measure_perplexity(tiny, None, settings=PerplexitySettings.of(config), work=Work(out, CPU))
    return dict(json.loads((out / "metrics.json").read_text()))


@pytest.mark.parametrize("window", [16, 128])
def test_perplexity_is_the_exponent_of_the_mean_loss(tiny: Path, folder: Callable[[str], Path], window: int) -> None:
    result = measure(tiny, folder, window=window)
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    inputs, losses = [tokenizer.bos_token_id, *ids[:-1]], []
    for start, first, stop in rolling_windows(len(ids), window):  # held equal to lm-eval's above
        with torch.no_grad():
            logprobs = model(torch.tensor([inputs[start:stop]])).logits[0].log_softmax(-1)
        losses += [-float(logprobs[i - start, ids[i]]) for i in range(first, stop)]
    assert len(losses) == len(ids) == result["tokens"]
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / len(ids)), rel=1e-5)
    assert result["byte_perplexity"] == pytest.approx(math.exp(sum(losses) / len(TEXT)), rel=1e-5)


@pytest.mark.parametrize(("text", "tokens"), [(TEXT, 19), ("für", 4)])
def test_bytes_are_those_of_the_text_that_is_read(
    tiny: Path, folder: Callable[[str], Path], text: str, tokens: int
) -> None:
    result = measure(tiny, folder, text, window=16, tokens=19)  # each token is a byte
    assert result["tokens"] == tokens
    assert result["byte_perplexity"] == pytest.approx(result["perplexity"])


def test_a_window_longer_than_the_models_context_is_refused(tiny: Path, folder: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=r"perplexity\.window: got 1024; allowed: at most 256, the model's context"):
        measure(tiny, folder, window=1024)


def test_an_empty_text_is_refused(tiny: Path, folder: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=r"\(a text\): holds no text; allowed: at least one document"):
        measure(tiny, folder, text="", window=16)
