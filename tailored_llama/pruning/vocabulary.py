"""The vocabulary as a kind of coupled group: a token's row of the embedding and, untied, of the head.

What ranks tokens is how often a text uses them. Rows do not depend on each other as channels do, so no gradient is
needed; but a token can only stay with the tokens that its merges make it of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailored_llama.config import ROWS, PlanConfig, Work
from tailored_llama.data import load_texts, read_prompts
from tailored_llama.errors import InputError
from tailored_llama.models import Tokens, load_tokenizer, read_structure, read_tokens
from tailored_llama.pruning.settings import CountSettings
from tailored_llama.store import read_table, write_table

COUNTS_SCHEMA = pa.schema({"token": pa.int32(), "text": pa.int64(), "prompts": pa.int64()})
_CHARACTERS = 20_000_000  # counted at most of a text: evenly spaced documents of it

Counts = np.ndarray[Any, Any]


def count_tokens(dense: Path, prompts: Mapping[str, Path], *, settings: CountSettings, work: Work) -> dict[str, Any]:
    """Stage: count how often the calibration text and train prompts use each token; write `tokens.parquet`.

    The text is the whole source that calibration draws its sequences from, at most 20 million characters of it. The
    texts of a mixture count by their weights, whatever their lengths. Of the prompts, shots and held-out examples count
    with all their choices; evaluation prompts are never read.

    Args:
        dense: provides the tokenizer.
        prompts: train prompts by name.

    Raises:
        InputError: the tokenizer cannot be trimmed.
    """
    rows, tokenizer, texts = read_tokens(dense).rows, load_tokenizer(dense), settings.texts
    counts = []
    for own in texts:
        documents = load_texts(own.source.text, work.downloads)
        step = max(1, math.ceil(sum(map(len, documents)) / _CHARACTERS))
        counts.append(_counts(tokenizer, (text[:_CHARACTERS] for text in documents[::step]), rows))
    asked = (
        context + continuation
        for folder in prompts.values()
        for split in ("shots", "held_out")
        for prompt in read_prompts(folder, split)
        for context, continuation in zip(prompt.contexts, prompt.continuations, strict=True)
    )
    text = counts[0] if len(texts) == 1 else _weighted(counts, [own.weight for own in texts], rows)
    columns = {"text": text, "prompts": _counts(tokenizer, asked, rows)}
    write_table(work.out / "tokens.parquet", {"token": range(rows)} | columns, COUNTS_SCHEMA)
    return {f"{name}_tokens": int(counts.sum()) for name, counts in columns.items()}


def _weighted(counts: Sequence[Counts], weights: Sequence[float], rows: int) -> Counts:
    """The counts of a mixture, int64 [rows]: each text is scaled to its share, and no used token to 0."""
    total, mixed = sum(own.sum() for own in counts), np.zeros(rows)
    for own, weight in zip(counts, weights, strict=True):
        mixed += own * (total * weight / sum(weights) / own.sum())
    return np.ceil(mixed).astype(np.int64)


def _counts(tokenizer: Any, texts: Iterable[str], rows: int) -> Counts:
    """How often each token occurs in texts, int64 [rows]."""
    counts, texts = np.zeros(rows, dtype=np.int64), iter(texts)
    while batch := list(islice(texts, 1000)):
        ids = chain.from_iterable(tokenizer(batch, add_special_tokens=False)["input_ids"])
        counts += np.bincount(np.fromiter(ids, dtype=np.int64), minlength=rows)
    return counts


def read_shares(counts: Path) -> Counts:
    """The share of each token in the text and in the prompts, the mean of both, float64 [rows].

    So a few prompts weigh as much as a long text: a token that they need is kept before one that is merely frequent.
    """
    table = read_table(counts / "tokens.parquet", COUNTS_SCHEMA)
    used = [table[name].to_numpy().astype(np.float64) for name in ("text", "prompts")]
    shares = [uses / uses.sum() for uses in used if uses.any()]
    return np.mean(shares, axis=0) if shares else np.zeros(len(table))


@dataclass(frozen=True)
class VocabularyPlan:
    """The tokens that stay, ascending, and the share of every token in the counted texts."""

    kept: tuple[int, ...]
    shares: Counts

    @property
    def whole(self) -> float:
        """The share of the counted tokens that stay whole."""
        return float(self.shares[list(self.kept)].sum())


def plan_vocabulary(
    checkpoint: Path, counts: Path, ratio: float, pruning: PlanConfig, original_parameters: int | None = None
) -> VocabularyPlan:
    """Choose the tokens that stay; more than configured where fewer would remove more than the ratio.

    Args:
        checkpoint: the model to prune.
        counts: the output of `count_tokens` for it.
        ratio: fraction of the original parameters to remove.
        pruning: the number of tokens, or their share.
        original_parameters: of the model before the first step; None: those of this one.

    Raises:
        InputError: the number of tokens is too small for those that must stay, or leaves nothing to remove.
    """
    tokens, shares, size = read_tokens(checkpoint), read_shares(counts), read_structure(checkpoint).size
    total = original_parameters or size.parameters
    budget = max(0, round(ratio * total) - (total - size.parameters))
    least = _up(size.vocab_size - budget // size.row)
    wanted = pruning.vocabulary if isinstance(pruning.vocabulary, int) else None
    if wanted is not None and wanted >= size.vocab_size:
        raise InputError(f"pruning.vocabulary: got {wanted}; allowed: below {size.vocab_size}, the model's tokens")
    return VocabularyPlan(tuple(choose_tokens(tokens, shares, wanted, pruning.vocabulary_share, least)), shares)


def choose_tokens(tokens: Tokens, shares: Counts, size: int | None, share: float, least: int = 0) -> list[int]:
    """The tokens of the highest shares with all that they are made of; equal shares go to the lower id, merged sooner.

    Args:
        shares: float64 [rows].
        size: how many, a multiple of 64; None: as many as stand for `share` of the text, rounded up.
        share: of the text, if `size` is None.
        least: the smallest number that is allowed.

    Raises:
        InputError: `size` is smaller than the number of tokens that must stay.
    """
    if size is not None and (must := _up(len(tokens.always))) > size:
        raise InputError(
            f"pruning.vocabulary: got {size}; allowed: at least {must}, for bytes, special tokens and chat template"
        )
    most = len(tokens.texts) // ROWS * ROWS
    order = [int(i) for i in np.argsort(-shares, kind="stable") if int(i) in tokens.texts]
    kept = set(tokens.always)
    if size is None:
        whole = shares[list(kept)].sum()
        for token in order:
            if whole >= share - 1e-12:
                break
            new = tokens.made_of([token]) - kept
            kept |= new
            whole += shares[list(new)].sum()
        size = _up(len(kept))
    size = min(max(size, least), most)
    if len(kept) > size:  # the last few of an odd vocabulary
        size = len(kept) // ROWS * ROWS
        kept = set(tokens.always)
    while len(kept) < size:  # a token that does not fit with its parts is passed over, and tried again
        for token in order:
            new = tokens.made_of([token]) - kept
            if len(kept) + len(new) <= size:
                kept |= new
    return sorted(kept)


def _up(number: int) -> int:
    """The next multiple of 64."""
    return -(-number // ROWS) * ROWS
