"""Transfer: what an adapter tuned on one benchmark gains on all others, as rows of `transfer.parquet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tailored_llama.config import UNTUNED_MODEL
from tailored_llama.evaluation.recovery import MEAN
from tailored_llama.evaluation.results import TransferScore
from tailored_llama.evaluation.scores import check_comparable, read_score
from tailored_llama.evaluation.statistics import Answers, above_floor, difference, interval, mean_of

# Used as names of a model or a benchmark; real names have no parentheses.
OWN, OTHERS, DIFFERENCE = "(own)", "(others)", "(own − others)"


@dataclass(frozen=True)
class TransferRow:
    """One row of `transfer.parquet`: a cell, or a mean gain over several; accuracies and gains are fractions."""

    model: str  # with benchmark (mean): (own), (others) or (own − others), the mean over all adapters
    benchmark: str  # (others): the mean over those that the model was not tuned on
    metric: str | None = None
    examples: int | None = None
    floor: float | None = None
    accuracy: float | None = None
    stderr: float | None = None
    above_floor: bool | None = None
    benchmarks: int = 0  # number of benchmarks in the gain
    gain: float | None = None  # over the pruned model, with its 95 % interval
    gain_low: float | None = None
    gain_high: float | None = None
    error: str | None = None

    @property
    def significant(self) -> bool:
        """Whether the interval of the gain excludes zero."""
        return self.gain_low is not None and self.gain_high is not None and self.gain_low * self.gain_high > 0


def transfer_rows(cells: Sequence[TransferScore[Path]], seed: int) -> list[TransferRow]:
    """Every cell in order, each model's mean gain on other benchmarks, and the means on own and other benchmarks.

    Intervals come from a paired bootstrap over the scored examples. A mean over benchmarks draws from each separately;
    a mean over models on one benchmark draws the same examples for all of them.

    Raises:
        InputError: scores of a benchmark have different examples or metrics, or a file is missing or broken.
    """
    scores = {(cell.model, cell.benchmark): read_score(cell.scores) for cell in cells if cell.scores}
    names = list(dict.fromkeys(cell.benchmark for cell in cells))
    for name in names:
        check_comparable(name, *(score for (_, benchmark), score in scores.items() if benchmark == name))
    answers: dict[str, dict[str, Answers]] = {cell.model: {} for cell in cells}
    for (model, name), score in scores.items():
        answers[model][name] = score.answers
    untuned = answers.get(UNTUNED_MODEL, {})
    rows = []
    for cell in cells:
        row = TransferRow(cell.model, cell.benchmark, error=cell.error)
        if one := scores.get((cell.model, cell.benchmark)):
            measured = (one.metric, len(one.answers.examples), one.floor, one.accuracy, one.stderr)
            tuned = {cell.benchmark: one.answers} if cell.model != UNTUNED_MODEL else {}
            significant = above_floor(one.accuracy, one.stderr, one.floor)
            row = TransferRow(cell.model, cell.benchmark, *measured, significant, **_gain(tuned, untuned, seed))
        rows.append(row)
    for model, by_name in answers.items():
        elsewhere = {name: one for name, one in by_name.items() if model not in (name, UNTUNED_MODEL)}
        rows.append(TransferRow(model, OTHERS, **_gain(elsewhere, untuned, seed)))
    own, others = {}, {}
    for name in untuned:
        beside = [answers[model][name].values for model in names if model != name and name in answers.get(model, {})]
        if beside and name in answers.get(name, {}):
            own[name] = answers[name][name]
            others[name] = replace(own[name], values=np.mean(beside, axis=0))
    for label, compared, baseline in ((OWN, own, untuned), (OTHERS, others, untuned), (DIFFERENCE, own, others)):
        rows.append(TransferRow(label, MEAN, **_gain(compared, baseline, seed)))
    return rows


def _gain(answers: Mapping[str, Answers], baseline: Mapping[str, Answers], seed: int) -> dict[str, Any]:
    """The gain over a baseline as fields of a row: the mean over the benchmarks that both have."""
    gains = [difference(own, baseline[name], seed, name) for name, own in answers.items() if name in baseline]
    if not gains:
        return {}
    mean = mean_of(gains)
    low, high = interval(np.round(mean.draws, 12))  # a draw without a difference becomes exactly zero
    return {"benchmarks": len(gains), "gain": mean.value, "gain_low": low, "gain_high": high}


def field_of(rows: Sequence[TransferRow]) -> tuple[list[str], list[str], dict[tuple[str, str], TransferRow]]:
    """Models (those not tuned on a single benchmark first), benchmarks, and the rows by both."""
    field = {(row.model, row.benchmark): row for row in rows}
    names = list(dict.fromkeys(name for _, name in field if name not in (OTHERS, MEAN)))
    models = list(dict.fromkeys(model for model, name in field if name in names))
    return sorted(models, key=lambda model: model in names), names, field
