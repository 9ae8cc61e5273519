"""Calibration: the token sequences that importance is measured on and reconstruction is fitted to."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tailored_llama.config import Work
from tailored_llama.data.prompts import read_prompts
from tailored_llama.data.texts import CalibrationSettings, load_texts
from tailored_llama.errors import InputError
from tailored_llama.models import load_tokenizer, read_config
from tailored_llama.store import read_table, write_table

CALIBRATION_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "source": pa.string(), "row": pa.int32()})
_EXCERPT_CHARACTERS = 64  # per wanted token, which is surely enough


def load_calibration(
    dense: Path, prompts: Mapping[str, Path], *, settings: CalibrationSettings, work: Work
) -> dict[str, Any]:
    """Stage: draw equally long token sequences from a text and write `calibration.parquet`.

    Documents come in random order, repeatedly if needed. A document that is long enough gives a random window, as in
    LLM-Pruner (arXiv 2305.11627); shorter ones are joined by blank lines until they are long enough. The text
    `prompts` is the run's own training examples with their answers, from the folders `prompts` by benchmark.
    InputError: a sequence is longer than all documents together, or than the model's context.
    """
    tokens, seed, texts = settings.tokens, settings.seed, settings.texts
    limit = int(read_config(dense).get("max_position_embeddings", tokens))
    if tokens > limit:
        raise InputError(f"calibration.tokens: got {tokens}; allowed: at most {limit}, the model's context")
    tokenizer = load_tokenizer(dense)
    drawn: list[tuple[list[int], str, int]] = []  # sequence, source, and the document in which it begins
    for i, part in enumerate(texts):
        source = part.source
        if source.kind == "prompts":
            shots = [prompt for folder in prompts.values() for prompt in read_prompts(folder, "shots")]
            documents = ["\n\n".join(prompt.solved for prompt in shots)]
        else:
            documents = load_texts(source, work.downloads)
        rng = np.random.default_rng([seed, i] if i else seed)
        sequences = islice(_draw(tokenizer, documents, tokens, rng, source.text.source), part.samples)
        drawn += [(sequence, source.name, row) for sequence, row in sequences]
    if len(texts) > 1:  # so that any part of the sequences is a mixture
        drawn = [drawn[i] for i in np.random.default_rng([seed, len(texts)]).permutation(len(drawn))]
    columns = dict(zip(CALIBRATION_SCHEMA.names, zip(*drawn, strict=True), strict=True))
    write_table(work.out / "calibration.parquet", columns, CALIBRATION_SCHEMA)
    return {"tokens": len(drawn) * tokens}


def _draw(
    tokenizer: Any, documents: Sequence[str], wanted: int, rng: np.random.Generator, source: str
) -> Iterator[tuple[list[int], int]]:
    """Draw sequences of the wanted number of tokens without end, each with the document in which it begins."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    once = cache(encode)  # documents may be drawn more than once; parts of a long one are hardly ever the same

    def excerpt(document: str) -> list[int]:
        most = _EXCERPT_CHARACTERS * wanted  # of a long document, only a part is tokenised
        if len(document) <= most:
            return once(document)
        start = int(rng.integers(len(document) - most + 1))
        return encode(document[start : start + most])

    joined, first, is_long_enough = list[int](), 0, True
    while is_long_enough:
        is_long_enough = False
        for row in map(int, rng.permutation(len(documents))):
            ids = excerpt(documents[row])
            if len(ids) >= wanted:
                is_long_enough = True
                start = int(rng.integers(len(ids) - wanted + 1))
                yield ids[start : start + wanted], row
                continue
            first = first if joined else row
            joined += ids + once("\n\n")
            if len(joined) >= wanted:
                is_long_enough = True
                yield joined[:wanted], first
                first, joined = row, joined[wanted:]
    raise InputError(f"calibration.tokens: got {wanted}; allowed: at most {len(joined)}, the tokens of {source}")


def read_calibration(folder: Path) -> Tensor:
    """Token ids of the calibration sequences, int64 [samples, tokens]."""
    table = read_table(folder / "calibration.parquet", CALIBRATION_SCHEMA)
    sequences = table["input_ids"].combine_chunks().to_numpy(zero_copy_only=False)
    return torch.from_numpy(np.stack(sequences).astype(np.int64))
