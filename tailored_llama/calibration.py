"""Calibration: the token sequences that importance is measured on and reconstruction fitted to."""

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

_PASS_TOKENS = 4096  # of a pass over sequences
_LONG = 64  # characters per token that surely hold enough tokens


def load_calibration(
    dense: Path, calibration: CalibrationConfig, downloads: str, seed: int, out: Path, prompts: Sequence[Path] = ()
) -> dict[str, Any]:
    """Stage: draw equally long token sequences from a text and write `calibration.parquet`.

    Documents come in random order, again and again until there is enough. One that is long enough gives a random
    window, as in LLM-Pruner (arXiv 2305.11627); shorter ones are joined by blank lines until they are. With the source
    `prompts`, the text is the run's own training examples with their answers, one after the other.

    Args:
        dense: the checkpoint, for its tokenizer.
        calibration: the text, and how much of it.
        downloads: folder of the fetched wheels.
        seed: of the draw.
        out: an existing folder.
        prompts: the train prompts of every benchmark, for the source `prompts`.

    Raises:
        InputError: all documents together are not as long as a sequence must be.
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

    blank = encode("\n\n")

    @cache  # where documents run out they are drawn again
    def tokens_of(row: int) -> list[int]:
        return encode(documents[row])

    def excerpt(row: int) -> list[int]:
        if (spare := len(documents[row]) - _LONG * calibration.tokens) <= 0:
            return tokens_of(row)
        start = int(rng.integers(spare + 1))  # of a whole book, only a part around the window is tokenised
        return encode(documents[row][start : start + _LONG * calibration.tokens])

    sequences: list[list[int]] = []
    rows: list[int] = []  # where each sequence begins
    joined: list[int] = []
    first, wanted = 0, calibration.tokens
    while len(sequences) < calibration.samples:
        before = len(sequences)
        for row in map(int, rng.permutation(len(documents))):
            ids = excerpt(row)
            if len(ids) >= wanted:
                start = int(rng.integers(len(ids) - wanted + 1))
                found, begins = ids[start : start + wanted], row
            else:
                first = first if joined else row
                joined += ids + blank
                if len(joined) < wanted:
                    continue
                found, begins, first, joined = joined[:wanted], first, row, joined[wanted:]
            sequences.append(found)
            rows.append(begins)
            if len(sequences) == calibration.samples:
                break
        if len(sequences) == before:
            raise InputError(
                f"calibration.tokens: got {wanted}; allowed: at most {len(joined)}, the tokens of {calibration.source}"
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


def sequences_at_once(input_ids: torch.Tensor, batch_tokens: int | None) -> int:
    """How many sequences a pass takes: 4,096 tokens of them, or `batch_tokens` if that is less; one in any case."""
    return max(1, min(_PASS_TOKENS, batch_tokens or _PASS_TOKENS) // input_ids.shape[1])
