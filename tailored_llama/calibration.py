"""Calibration: the token sequences whose gradients say what matters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tailored_llama.artifacts import read_table, write_table
from tailored_llama.checkpoints import read_config
from tailored_llama.config import CalibrationConfig
from tailored_llama.errors import InputError
from tailored_llama.models import load_tokenizer
from tailored_llama.prompts import read_prompts
from tailored_llama.texts import PROMPTS, load_texts, text_name

CALIBRATION_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "source": pa.string(), "row": pa.int32()})

_LONG = 64  # characters per token that surely hold enough tokens


def load_calibration(
    dense: Path, calibration: CalibrationConfig, downloads: str, seed: int, out: Path, prompts: Sequence[Path] = ()
) -> dict[str, Any]:
    """Stage: draw equally long token sequences from a text and write `calibration.parquet`.

    As LLM-Pruner (arXiv 2305.11627) does: documents in random order, one random window of each that is long enough;
    where documents run out, further windows of the same ones. With the source `prompts`, the text is the run's own
    training examples with their answers, one after the other.

    Args:
        dense: the checkpoint, for its tokenizer.
        calibration: the text, and how much of it.
        downloads: folder of the fetched wheels.
        seed: of the draw.
        out: an existing folder.
        prompts: the train prompts of every benchmark, for the source `prompts`.

    Raises:
        InputError: no document is as long as a sequence must be.
    """
    if calibration.source == PROMPTS:
        shots = [prompt for folder in prompts for prompt in read_prompts(folder, "shots")]
        documents = ["\n\n".join(p.contexts[p.answer] + p.continuations[p.answer] for p in shots)]
    else:
        documents = load_texts(calibration, downloads)
    tokenizer = load_tokenizer(dense)
    if calibration.tokens > (limit := read_config(dense).get("max_position_embeddings", calibration.tokens)):
        raise InputError(f"calibration.tokens: got {calibration.tokens}; allowed: at most {limit}, the model's context")
    rng = np.random.default_rng(seed)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    @cache  # where documents run out they are drawn again
    def tokens_of(row: int) -> list[int]:
        return encode(documents[row])

    def excerpt(row: int) -> list[int]:
        if (spare := len(documents[row]) - _LONG * calibration.tokens) <= 0:
            return tokens_of(row)
        start = int(rng.integers(spare + 1))  # of a whole book, only a part around the window is tokenised
        return encode(documents[row][start : start + _LONG * calibration.tokens])

    sequences: list[list[int]] = []
    rows: list[int] = []
    while len(sequences) < calibration.samples:
        before = len(sequences)
        for row in map(int, rng.permutation(len(documents))):
            ids = excerpt(row)
            if len(ids) < calibration.tokens:
                continue
            start = int(rng.integers(len(ids) - calibration.tokens + 1))
            sequences.append(ids[start : start + calibration.tokens])
            rows.append(row)
            if len(sequences) == calibration.samples:
                break
        if len(sequences) == before:
            longest = max(len(tokens_of(row)) for row in range(len(documents)))
            raise InputError(
                f"calibration.tokens: got {calibration.tokens}; allowed: at most {longest}, the longest document of "
                f"{calibration.source}"
            )
    write_table(
        out / "calibration.parquet",
        {"input_ids": sequences, "source": [text_name(calibration)] * len(rows), "row": rows},
        CALIBRATION_SCHEMA,
    )
    return {"tokens": len(sequences) * calibration.tokens}


def read_calibration(folder: Path) -> torch.Tensor:
    """Token ids of the calibration sequences, int64 [samples, tokens]."""
    table = read_table(folder / "calibration.parquet", CALIBRATION_SCHEMA)
    return torch.tensor(table["input_ids"].to_pylist(), dtype=torch.long)
