"""The rows of a sweep over a grid of settings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from tailored_llama.config import DENSE
from tailored_llama.evaluation.recovery import MEAN, TAILORED, RecoveryRow, recovery_rows
from tailored_llama.evaluation.results import MeasuredModel
from tailored_llama.evaluation.scores import read_metrics, read_score
from tailored_llama.models import read_structure


@dataclass(frozen=True)
class SweepRow:
    """The figures of a cell, or of several that differ only in their seed; or the error that left none.

    Sizes and perplexity are means over the seeds; recoveries, as in `RecoveryRow`, are from each example's mean over
    them. `_least` and `_most` are the extremes of single seeds. `dense_…` is of the cell's untuned dense model.
    """

    label: str
    ratio: float  # 0: a dense model
    seeds: int = 1
    parameters: int | None = None
    body: int | None = None  # parameters without the embedding and an untied head
    dense_parameters: int | None = None
    dense_body: int | None = None
    perplexity: float | None = None  # per token of the dense model, also where a cell's own vocabulary has fewer
    perplexity_least: float | None = None
    perplexity_most: float | None = None
    dense_perplexity: float | None = None
    accuracy: float | None = None  # mean of the headline metrics
    accuracy_stderr: float | None = None
    examples: int | None = None
    recovery: float | None = None
    recovery_low: float | None = None
    recovery_high: float | None = None
    recovery_least: float | None = None
    recovery_most: float | None = None
    chance_corrected: float | None = None
    cc_low: float | None = None
    cc_high: float | None = None
    cc_benchmarks: int | None = None
    error: str | None = None

    @property
    def removed(self) -> float:
        return 1 - (self.parameters or 0) / (self.dense_parameters or 1)

    @property
    def removed_of_body(self) -> float:
        return 1 - (self.body or 0) / (self.dense_body or 1)

    @property
    def times_dense(self) -> float:
        """Perplexity ÷ the dense model's."""
        return (self.perplexity or math.nan) / (self.dense_perplexity or math.nan)


_RECOVERY = ("recovery", "recovery_low", "recovery_high")  # these and the next are fields of `RecoveryRow`, too
_OVERALL = ("accuracy", "examples", *_RECOVERY, "chance_corrected", "cc_low", "cc_high", "cc_benchmarks")


def measure(
    row: SweepRow, cells: Sequence[MeasuredModel[Path]], dense: Sequence[MeasuredModel[Path]]
) -> tuple[SweepRow, list[RecoveryRow]]:
    """The row with the figures of its cells, which differ only in their seed, and their rows on each benchmark."""
    sizes = [read_structure(cell.checkpoint).size for cell in cells]
    dense_size = read_structure(dense[0].checkpoint).size
    perplexities = [_perplexity(cell, base) for cell, base in zip(cells, dense, strict=True)]
    row = replace(
        row,
        seeds=len(cells),
        parameters=round(fmean(size.parameters for size in sizes)),
        body=round(fmean(size.body for size in sizes)),
        dense_parameters=dense_size.parameters,
        dense_body=dense_size.body,
        perplexity=fmean(perplexities),
        perplexity_least=min(perplexities),
        perplexity_most=max(perplexities),
        dense_perplexity=_perplexity(dense[0], dense[0]),
    )
    if not cells[0].scores:
        return row, []
    recoveries = _recovery(cells, dense)
    overall = recoveries[-1]
    seeds = [_recovery([cell], [base])[-1].recovery for cell, base in zip(cells, dense, strict=True)]
    known = [value for value in seeds if value is not None]
    row = replace(
        row,
        accuracy_stderr=overall.stderr,
        recovery_least=min(known, default=None),
        recovery_most=max(known, default=None),
        **{name: getattr(overall, name) for name in _OVERALL},
    )
    return row, [replace(own, model=row.label, ratio=row.ratio) for own in recoveries if own.benchmark != MEAN]


def _perplexity(cell: MeasuredModel[Path], dense: MeasuredModel[Path]) -> float:
    """Perplexity per token of the dense model; both measured one text."""
    # A cell has all of its measurements, or an error.
    measured, theirs = (read_metrics(model.perplexity) for model in (cell, dense) if model.perplexity)
    if measured["tokens"] == theirs["tokens"]:
        return float(measured["perplexity"])
    return math.exp(math.log(measured["perplexity"]) * measured["tokens"] / theirs["tokens"])


def _recovery(cells: Sequence[MeasuredModel[Path]], dense: Sequence[MeasuredModel[Path]]) -> list[RecoveryRow]:
    """The rows of cells that differ only in their seed, the mean last."""
    scores = {
        model: {name: read_score(*(measured.scores[name] for measured in models)) for name in models[0].scores}
        for model, models in ((DENSE, dense), (TAILORED, cells))
    }
    return [row for row in recovery_rows(scores) if row.model == TAILORED]
