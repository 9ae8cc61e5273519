"""The split of a ratio: how much of it tokens give, and how much the layers.

Importance has no unit for what a token costs beside a channel, so it is measured.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, takewhile
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailored_llama import models
from tailored_llama.config import ROWS, Work
from tailored_llama.data import Prompt, encode_answer, loglikelihoods
from tailored_llama.errors import InputError
from tailored_llama.pruning.settings import SplitSettings
from tailored_llama.pruning.surgery import Cut, Planned, plan_cut, prune_checkpoint
from tailored_llama.pruning.vocabulary import (
    Counts,
    VocabularyPlan,
    check_size,
    choose_tokens,
    measured_prompts,
    read_shares,
    whole_rows,
)
from tailored_llama.store import read_table, write_rows, write_table

SPLIT = "split.parquet"
KEPT_SCHEMA = pa.schema({"token": pa.int32(), "share": pa.float64(), "kept": pa.bool_()})
_cost: Callable[[Any], float] = attrgetter("nats_per_byte")  # of a split that was measured
_WHOLE = 0.9  # fewer tokens than keep this share whole are only tried if nothing else reaches the ratio
_ENOUGH = 0.995  # the share that stays whole where nothing can be measured
_BYTES = 16_000  # of the prompts that are read, about; they are evenly spaced


@dataclass(frozen=True)
class Split:
    """A number of tokens, how many of further tokens they keep whole, what the layers give, and what that costs."""

    tokens: int  # that stay
    whole: float  # the share of further tokens that are expected to stay whole
    body_ratio: float  # what leaves of the layers
    nats_per_byte: float | None = None  # on the measured prompts; None: not measured
    chosen: bool = False


def choose_split(
    dense: Path,
    groups: Path,
    importance: Path,
    counts: Path,
    prompts: Mapping[str, Path],
    *,
    settings: SplitSettings,
    work: Work,
) -> dict[str, Any]:
    """Stage: choose the tokens that stay; write `kept.parquet`, and the splits that were tried as `split.parquet`.

    Their number is the configured one, or it is searched for. Models with more and more tokens, and less and less of
    the layers, are cut without reconstruction, and read held-out examples (or the shots) with their right answers. For
    these trials, tokens are chosen as if the examples had not been counted, and keep 90 % of further ones whole, if the
    ratio can be reached so. Without train prompts, the fewest tokens that keep 99.5 % whole are taken.

    Raises:
        InputError: as in `plan_cut` and `choose_tokens`, if no number of tokens reaches the ratio.
    """
    planned = Planned(dense, groups, importance, settings.ratio, settings.plan)
    tokens, shares = models.read_tokens(dense), read_shares(counts)
    if tried := _try_sizes(planned, tokens, read_shares(counts, unmeasured=True), prompts.values(), work):
        cut = plan_cut(planned, choose_tokens(tokens, shares, min(tried, key=_cost).tokens))
    else:  # one number, or nothing to measure on, such as tasks without a train split
        cut = first_cut(planned, tokens, shares, least=_ENOUGH)
        tried = [_split(cut)]
    assert cut.tokens
    size, kept = len(cut.tokens.kept), np.isin(np.arange(tokens.rows), cut.tokens.kept)
    write_table(work.out / "kept.parquet", {"token": range(tokens.rows), "share": shares, "kept": kept}, KEPT_SCHEMA)
    write_rows(work.out / SPLIT, [replace(split, chosen=split.tokens == size) for split in tried], Split)
    return {"tokens": size, "tokens_whole": round(cut.tokens.whole, 6), "tried": len(tried)}


def _try_sizes(
    planned: Planned, tokens: models.Tokens, shares: Counts, prompts: Iterable[Path], work: Work
) -> list[Split]:
    """The splits of several numbers of tokens, measured on prompts; none if there is nothing to choose or measure."""
    sizes, measured, trials = possible_sizes(planned, tokens), measured_prompts(prompts), count(1)
    if len(sizes) < 2 or not measured:
        return []
    step = max(1, round(sum(len(prompt.solved.encode()) for prompt in measured) / _BYTES))

    @cache
    def choose(size: int) -> VocabularyPlan:
        return choose_tokens(tokens, shares, size)

    def measure(size: int) -> Split | None:
        """The split of a number of tokens; None: the layers cannot give the rest."""
        try:
            cut = plan_cut(planned, choose(size))
        except InputError:
            return None
        split = _split(cut, _loss(cut, measured[::step], work))
        work.progress(min(next(trials), len(sizes)), len(sizes))
        return split

    return search(measure, [size for size in sizes if choose(size).whole >= _WHOLE]) or search(measure, sizes)


def read_split(folder: Path) -> VocabularyPlan | None:
    """The tokens that stay; None: all of them, so that the vocabulary is not touched."""
    table = read_table(folder / "kept.parquet", KEPT_SCHEMA)
    kept = np.flatnonzero(table["kept"].to_numpy())
    return VocabularyPlan(tuple(kept.tolist()), table["share"].to_numpy()) if len(kept) < len(table) else None


def possible_sizes(planned: Planned, tokens: models.Tokens) -> list[int]:
    """Numbers of tokens to try, ascending, from where tokens reach the ratio alone, or nearly, to where all stay.

    It is only the configured number, or more if that would remove more than the ratio.

    Raises:
        InputError: the configured number leaves nothing to remove.
    """
    size, configured = models.read_structure(planned.dense).size, planned.limits.vocabulary
    least = whole_rows(size.vocab_size - round(planned.ratio * size.parameters) // size.row)
    if isinstance(configured, int):
        if configured >= size.vocab_size:
            raise InputError(
                f"pruning.vocabulary: got {configured}; allowed: below {size.vocab_size}, the model's tokens"
            )
        check_size(tokens, configured)
        return [max(configured, least)]
    first = max(least, whole_rows(len(tokens.always)))
    return [*takewhile(lambda tokens: tokens < size.vocab_size, (first * 2**step for step in count())), size.vocab_size]


def first_cut(planned: Planned, tokens: models.Tokens, shares: Counts, least: float = 0) -> Cut:
    """The first split that reaches a ratio and keeps a share of further tokens whole; else the last that reaches it.

    Raises:
        InputError: none reaches it. The message is that of the fewest tokens, with which the largest ratio is reached.
    """
    cut, refused = None, list[InputError]()
    for size in possible_sizes(planned, tokens):
        try:
            cut = plan_cut(planned, choose_tokens(tokens, shares, size))
        except InputError as error:
            refused.append(error)
            continue
        if cut.tokens and cut.tokens.whole >= least:
            return cut
    if not cut:
        raise refused[0]
    return cut


def search(measure: Callable[[int], Split | None], sizes: Sequence[int]) -> list[Split]:
    """Measure ascending sizes until the loss rises, then half way to both neighbours of the best; sorted by size."""
    splits: dict[int, Split] = {}
    for size in sizes:
        if split := measure(size):
            splits[size] = split
            if _cost(split) > min(map(_cost, splits.values())):
                break
    if not splits:
        return []
    tried, best = list(splits), min(splits, key=lambda size: _cost(splits[size]))
    at = tried.index(best)
    for neighbour in (*tried[max(0, at - 1) : at], *tried[at + 1 : at + 2]):
        middle = round((best * neighbour) ** 0.5 / ROWS) * ROWS
        if middle not in splits and (split := measure(middle)):
            splits[middle] = split
    return [splits[size] for size in sorted(splits)]


def _split(cut: Cut, loss: float | None = None) -> Split:
    assert cut.tokens
    given = int(cut.groups.parameters[~cut.kept].sum()) / models.read_structure(cut.dense).size.body
    return Split(len(cut.tokens.kept), cut.tokens.whole, given, loss)


def _loss(cut: Cut, prompts: Sequence[Prompt], work: Work) -> float:
    """Nats per byte of prompts with their right answers, read by the model without what is cut."""
    with tempfile.TemporaryDirectory(dir=work.out) as scratch:
        folder, states = Path(scratch) / "cut", Path(scratch) / "states"
        folder.mkdir()
        states.mkdir()
        prune_checkpoint(cut.dense, cut.layer, cut.stays, folder, tokens=cut.tokens)
        model, tokenizer = models.open_model(folder, work.execution, states), models.load_tokenizer(folder)
        limit = models.context_length(model)  # a text has no more tokens than bytes
        texts = [prompt.solved.encode()[-limit:].decode(errors="ignore") for prompt in prompts]
        encoded = [encode_answer(tokenizer, Prompt(0, ("",), (text,), 0, (1,)), limit) for text in texts]
        likelihoods = loglikelihoods(model, encoded, models.token_budget(work.execution.batch_tokens, model))
    return -sum(sum(of_text) for of_text in likelihoods) / sum(len(text.encode()) for text in texts)
