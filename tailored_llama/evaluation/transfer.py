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
from tailored_llama.evaluation.statistics import Answers, above_floor, interval, paired_draws

# Used as names of a model or a benchmark; real names have no parentheses.
OWN, OTHERS, DIFFERENCE = "(own)", "(others)", "(own − others)"


@dataclass(frozen=True)
class TransferRow:
    """One row of `transfer.parquet`: a cell, or a mean gain over several.

    Accuracies and gains are fractions, not points; `gain` is over the pruned model, `_low` and `_high` bound its 95 %
    interval. Benchmark "(others)" is a model's mean gain on those that it was not tuned on. Benchmark "(mean)" is the
    mean gain over all adapters: on their "(own)" benchmark, on "(others)", and the difference.
    """

    model: str
    benchmark: str
    metric: str | None = None
    examples: int | None = None
    floor: float | None = None
    accuracy: float | None = None
    stderr: float | None = None
    above_floor: bool | None = None
    benchmarks: int = 0  # number of benchmarks in the gain
    gain: float | None = None
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
    models = dict.fromkeys(cell.model for cell in cells)
    for name in names:
        if column := [score for (_, benchmark), score in scores.items() if benchmark == name]:
            check_comparable(name, *column)
    answers = {cell_key: score.answers for cell_key, score in scores.items()}
    untuned = {name: answers[UNTUNED_MODEL, name] for name in names if (UNTUNED_MODEL, name) in answers}
    rows = []
    for cell in cells:
        row, score = TransferRow(cell.model, cell.benchmark, error=cell.error), scores.get((cell.model, cell.benchmark))
        if score:
            tuned = {cell.benchmark: score.answers} if cell.model != UNTUNED_MODEL else {}
            measured = (score.metric, len(score.answers.examples), score.floor, score.accuracy, score.stderr)
            significant = above_floor(score.accuracy, score.stderr, score.floor)
            row = TransferRow(cell.model, cell.benchmark, *measured, significant, **_gain(tuned, untuned, seed))
        rows.append(row)
    for model in models:
        elsewhere = [name for name in names if model not in (name, UNTUNED_MODEL) and (model, name) in answers]
        gained = _gain({name: answers[model, name] for name in elsewhere}, untuned, seed)
        rows.append(TransferRow(model, OTHERS, **gained))
    others_answers = {name: [answers[m, name] for m in names if m != name and (m, name) in answers] for name in names}
    both = [name for name in untuned if (name, name) in answers and others_answers[name]]
    own = {name: answers[name, name] for name in both}
    means = {name: np.mean([one.values for one in others_answers[name]], axis=0) for name in both}
    others = {name: replace(own[name], values=mean) for name, mean in means.items()}
    for label, compared, baseline in ((OWN, own, untuned), (OTHERS, others, untuned), (DIFFERENCE, own, others)):
        rows.append(TransferRow(label, MEAN, **_gain(compared, baseline, seed)))
    return rows


def _gain(answers: Mapping[str, Answers], baseline: Mapping[str, Answers], seed: int) -> dict[str, Any]:
    """The gain of answers over a baseline, as the mean over the benchmarks that both have."""
    pairs = {name: (own, baseline[name]) for name, own in answers.items() if name in baseline}
    if not pairs:
        return {}
    draws = [np.subtract(*paired_draws(*pair, [seed, *name.encode()])) for name, pair in pairs.items()]
    drawn = np.asarray(np.round(np.mean(draws, axis=0), 12))  # a draw without a difference becomes exactly zero
    gain = float(np.mean([own.values.mean() - base.values.mean() for own, base in pairs.values()]))
    low, high = interval(drawn)
    return {"benchmarks": len(pairs), "gain": gain, "gain_low": low, "gain_high": high}


def field_of(rows: Sequence[TransferRow]) -> tuple[list[str], list[str], dict[tuple[str, str], TransferRow]]:
    """Models (those not tuned on a single benchmark first), benchmarks, and the rows by both."""
    field = {(row.model, row.benchmark): row for row in rows}
    names = list(dict.fromkeys(name for _, name in field if name not in (OTHERS, MEAN)))
    models = list(dict.fromkeys(model for model, name in field if name in names))
    return sorted(models, key=lambda model: model in names), names, field
