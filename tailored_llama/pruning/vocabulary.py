"""The vocabulary as a kind of coupled group: a token's rows, ranked by how often texts use the token.

A token can only stay with the tokens that its merges make it of.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailored_llama.config import ROWS, Work
from tailored_llama.data import Prompt, PromptSplit, load_questions, load_texts, read_general_words, read_prompts
from tailored_llama.errors import InputError
from tailored_llama.models import Tokens, load_tokenizer, read_tokens
from tailored_llama.pruning.settings import CountSettings
from tailored_llama.store import read_table, write_table

COUNTS_SCHEMA = pa.schema(
    [
        ("token", pa.int32()),
        ("general", pa.int64()),  # how often general text uses it
        ("text", pa.int64()),  # how often the calibration text does
        ("prompts", pa.int64()),  # how often the train prompts do
        ("measured_text", pa.int64()),  # of these, in the examples that a split is measured on
        ("measured_prompts", pa.int64()),
    ]
)
# General text counts as much as this many tokens of the run's own. With 100 rows each of the eight embedded benchmarks,
# this foretells the tokens of the others best (tests/performance/coverage.py).
GENERAL_TOKENS = 10_000
_WHOLE = 0.999  # of further tokens, that a file without the others is expected to keep whole
_CHARACTERS = 20_000_000  # counted at most of a text: evenly spaced documents of it

Counts = np.ndarray[Any, Any]


def count_tokens(dense: Path, prompts: Mapping[str, Path], *, settings: CountSettings, work: Work) -> dict[str, Any]:
    """Stage: count how often the calibration text, the train prompts and general text use each token.

    Writes `tokens.parquet`. The text is the whole source that calibration draws its sequences from, at most 20 million
    characters of it; the questions of each benchmark count alike, however many they are. They, shots and
    held-out examples count with all their choices; evaluation prompts are never read. General text is the words of the
    train splits of the embedded benchmarks (`general_words.parquet`).

    Raises:
        InputError: the tokenizer cannot be trimmed.
    """
    rows, tokenizer, texts = read_tokens(dense).rows, load_tokenizer(dense), settings.texts
    columns = {"token": np.arange(rows), "general": word_counts(tokenizer, read_general_words(), rows)}
    used = []  # of each text: of the documents that are not measured, and of those that are, int64 [2, rows]
    for text_config in texts:
        if text_config.benchmark and text_config.kind == "questions":  # by example, with its choices
            documents = load_questions(text_config.benchmark, work.downloads, choices=True)
            folders = [folder for name, folder in prompts.items() if name == text_config.benchmark.name]
            apart = {prompt.example for prompt in measured_prompts(folders)}
        else:
            documents, apart = dict(enumerate(load_texts(text_config, work.downloads))), set()
        step = max(1, math.ceil(sum(map(len, documents.values())) / _CHARACTERS))
        read = [(index in apart, documents[index][:_CHARACTERS]) for index in list(documents)[::step]]
        split = ([text for is_measured, text in read if is_measured == measured] for measured in (False, True))
        used.append(np.stack([_counts(tokenizer, part, rows) for part in split]))
    mixed, total = np.zeros((2, rows)), sum(int(counts.sum()) for counts in used)
    for counts in used:  # scaled to its share, and no used token to 0
        mixed += counts * (total / len(used) / max(1, int(counts.sum())))
    unmeasured, columns["measured_text"] = np.ceil(mixed).astype(np.int64)
    columns["text"] = unmeasured + columns["measured_text"]
    splits: tuple[PromptSplit, ...] = ("shots", "held_out")
    train = [prompt for folder in prompts.values() for split in splits for prompt in read_prompts(folder, split)]
    columns["prompts"] = _counts(tokenizer, _written(train), rows)
    columns["measured_prompts"] = _counts(tokenizer, _written(measured_prompts(prompts.values())), rows)
    write_table(work.out / "tokens.parquet", columns, COUNTS_SCHEMA)
    return {f"{name}_tokens": int(columns[name].sum()) for name in ("general", "text", "prompts")}


def measured_prompts(folders: Iterable[Path]) -> list[Prompt]:
    """The examples that a split is measured on: each benchmark's held-out ones, or the shots if there are none."""
    examples = (read_prompts(folder, "held_out") or read_prompts(folder, "shots") for folder in folders)
    return list(chain.from_iterable(examples))


def _written(prompts: Iterable[Prompt]) -> Iterator[str]:
    for prompt in prompts:
        yield from map("".join, zip(prompt.contexts, prompt.continuations, strict=True))


def _counts(tokenizer: Any, texts: Iterable[str], rows: int) -> Counts:
    """Count how often each token occurs in texts, int64 [rows]."""
    counts, texts = np.zeros(rows, dtype=np.int64), iter(texts)
    while batch := list(islice(texts, 1000)):
        ids = chain.from_iterable(tokenizer(batch, add_special_tokens=False)["input_ids"])
        counts += np.bincount(np.fromiter(ids, dtype=np.int64), minlength=rows)[:rows]  # added tokens may have no row
    return counts


def word_counts(tokenizer: Any, words: Mapping[str, int], rows: int) -> Counts:
    """Count how often each token occurs in words with their counts, int64 [rows]."""
    # After a line break, since some tokenizers put a space of their own before the first word.
    # The tokenizer's core counts 80,000 words in a third of the time that transformers takes around it.
    core = tokenizer.backend_tokenizer
    core.no_padding()  # as transformers does at every call: a tokenizer's file may ask for both
    core.no_truncation()
    start = len(core.encode("\n", add_special_tokens=False).ids)
    written = core.encode_batch_fast([f"\n{word}" for word in words], add_special_tokens=False)
    ids = [encoding.ids[start:] for encoding in written]
    weights = np.repeat(np.fromiter(words.values(), dtype=np.int64), [len(encoding) for encoding in ids])
    return np.bincount(np.fromiter(chain.from_iterable(ids), dtype=np.int64), weights, rows)[:rows].astype(np.int64)


def read_shares(counts: Path, unmeasured: bool = False) -> Counts:
    """The share that each token is expected to have in further text of the job, float64 [rows].

    The shares in the text and in the prompts count alike, so that a few prompts weigh as much as a long text. General
    text is a Dirichlet prior of `GENERAL_TOKENS` tokens. `unmeasured`: without what a split is measured on.
    """
    table = read_table(counts / "tokens.parquet", COUNTS_SCHEMA)
    columns = {name: table[name].to_numpy().astype(np.float64) for name in COUNTS_SCHEMA.names[1:]}
    uses_by_text = [columns[name] - unmeasured * columns[f"measured_{name}"] for name in ("text", "prompts")]
    shares = [uses / uses.sum() for uses in uses_by_text if uses.any()]
    return _expected(sum(uses_by_text), np.mean(shares, axis=0) if shares else np.zeros(len(table)), columns["general"])


def _expected(counts: Counts, shares: Counts, general: Counts) -> Counts:
    """The shares of further text: those of counted text, mixed with those of general text."""
    seen = counts.sum() / (counts.sum() + GENERAL_TOKENS)
    return np.asarray(seen * shares + (1 - seen) * general / general.sum())


@dataclass(frozen=True)
class VocabularyPlan:
    """The tokens that stay, ascending, and the share that every token is expected to have in further text."""

    kept: tuple[int, ...]
    shares: Counts

    @property
    def whole(self) -> float:
        """The share of further tokens that are expected to stay whole."""
        return float(self.shares[list(self.kept)].sum())


def choose_tokens(tokens: Tokens, shares: Counts, size: int) -> VocabularyPlan:
    """The tokens of the highest shares with all that they are made of; equal shares go to the lower id, merged sooner.

    They are `size` tokens, a multiple of 64, or all.

    Raises:
        InputError: `size` is smaller than the number of tokens that must stay.
    """
    if size >= tokens.rows:
        return VocabularyPlan(tuple(range(tokens.rows)), shares)
    check_size(tokens, size)
    size = min(size, len(tokens.texts) // ROWS * ROWS)
    order = [int(i) for i in np.argsort(-shares, kind="stable") if int(i) in tokens.texts]
    kept = set(tokens.always)
    while len(kept) < size:  # a token that does not fit with its parts is passed over, and tried again
        for token in order:
            if len(kept) == size:
                break
            new = tokens.made_of([token], besides=kept)
            if len(kept) + len(new) <= size:
                kept |= new
    return VocabularyPlan(tuple(sorted(kept)), shares)


def tokens_for_texts(tokens: Tokens, tokenizer: Any, texts: Iterable[str], size: int | None) -> VocabularyPlan:
    """Choose the tokens that texts need, and fill up with those that general text uses most.

    They are `size` tokens, a multiple of 64; None: as many as `enough_tokens` says. The plan's shares are the texts'.

    Raises:
        InputError: the texts have no tokens, `size` is too small, or no token would leave.
    """
    counts, most = _counts(tokenizer, texts, tokens.rows), (tokens.rows - 1) // ROWS * ROWS
    allowed = f"a multiple of {ROWS} up to {most}, as the model has {tokens.rows}"
    if not counts.any():
        raise InputError("text: holds no text; allowed: at least one token")
    used = counts / counts.sum()
    shares = _expected(counts, used, word_counts(tokenizer, read_general_words(), tokens.rows))
    if size is None:
        needed = _needed(tokens, shares, counts)
        if (size := whole_rows(needed)) > min(most, len(tokens.texts) // ROWS * ROWS):
            raise InputError(f"tokens: not set, and the texts need {needed}; allowed: {allowed}")
    elif size % ROWS or not 0 < size <= most:
        raise InputError(f"tokens: got {size}; allowed: {allowed}")
    check_size(tokens, size, "tokens")
    return VocabularyPlan(choose_tokens(tokens, shares + (counts > 0), size).kept, used)  # the texts' own come first


def enough_tokens(dense: Path, counts: Path, whole: float) -> int:
    """The tokens that a job needs: all that its counted texts use, and so many of general text that a share of further
    tokens is expected to stay whole. A multiple of 64.
    """
    table = read_table(counts / "tokens.parquet", COUNTS_SCHEMA)
    return whole_rows(_needed(read_tokens(dense), read_shares(counts), table["prompts"].to_numpy(), whole))


def _needed(tokens: Tokens, shares: Counts, counts: Counts, whole: float = _WHOLE) -> int:
    """Count the tokens that texts use, and the likeliest further ones up to a share, with all that they are made of."""
    order = np.argsort(-shares, kind="stable")
    likely = order[: int(np.searchsorted(np.cumsum(shares[order]), whole)) + 1].tolist()
    return len(tokens.made_of({*tokens.always, *np.flatnonzero(counts).tolist(), *likely}))


def check_size(tokens: Tokens, size: int, field: str = "pruning.vocabulary") -> None:
    """Raise an InputError if so many tokens are not enough for those that must stay; `field` set the number."""
    if (must := whole_rows(len(tokens.always))) > size:
        raise InputError(f"{field}: got {size}; allowed: at least {must}, for bytes, special tokens and chat template")


def whole_rows(number: int) -> int:
    """The next multiple of 64."""
    return -(-number // ROWS) * ROWS
