"""Text that the dense model writes itself: how much, from which seed, and what it is used for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import CPU, save_worded_llama
from tailored_llama.config import CalibrationConfig, TextConfig
from tailored_llama.data import load_texts, read_calibration
from tailored_llama.data.calibration import load_calibration
from tailored_llama.data.self_text import write_text
from tailored_llama.errors import InputError
from tailored_llama.models import load_tokenizer

Make = Callable[[str], Path]


@pytest.fixture
def dense(folder: Make) -> Path:
    return save_worded_llama(folder("dense"))


def write(dense: Path, out: Path, **changes: Any) -> Path:
    write_text(dense, **{"tokens": 200, "length": 32, "seed": 0, "out": out, "execution": CPU} | changes)
    return out


def documents(folder: Path) -> list[str]:
    return load_texts(TextConfig(source="self"), "", folder)


def test_as_much_as_is_asked_for_in_short_documents_without_special_tokens(dense: Path, folder: Make) -> None:
    tokenizer, texts = load_tokenizer(dense), documents(write(dense, folder("out")))
    assert sum(len(tokenizer(text)["input_ids"]) for text in texts) >= 200
    assert len(texts) >= 7
    assert all(len(tokenizer(text)["input_ids"]) < 200 for text in texts)
    assert not any(special in text for special in tokenizer.all_special_tokens for text in texts)


def test_the_seed_decides(dense: Path, folder: Make) -> None:
    one, same = write(dense, folder("one")), write(dense, folder("same"))
    assert (one / "self_text.parquet").read_bytes() == (same / "self_text.parquet").read_bytes()
    assert documents(write(dense, folder("other"), seed=1)) != documents(one)
    execution = CPU.model_copy(update={"batch_tokens": 64})  # which changes no artifact
    assert documents(write(dense, folder("less at once"), execution=execution)) == documents(one)


def test_calibration_draws_from_it(dense: Path, folder: Make) -> None:
    text, out = write(dense, folder("text")), folder("out")
    config = CalibrationConfig(source="self", samples=6, tokens=32)
    load_calibration(dense, (), text, calibration=config, downloads="", seed=0, out=out)
    sequences = read_calibration(out)
    assert sequences.shape == (6, 32)
    assert len({tuple(map(int, ids)) for ids in sequences}) == 6  # enough was written that none repeats


def test_what_cannot_be_written_is_refused(dense: Path, folder: Make) -> None:
    message = "calibration.tokens: got 257; allowed: at most 256, the model's context"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        write(dense, folder("long"), length=257)
    assert documents(write(dense, folder("whole"), length=256))
    execution = CPU.model_copy(update={"streaming": "always"})
    message = "execution.streaming: got 'always' with text that the model writes; allowed: auto or never"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        write(dense, folder("streamed"), execution=execution)
