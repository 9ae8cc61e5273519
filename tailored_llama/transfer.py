"""Transfer: what an adapter tuned on one benchmark brings on all the others, as rows of `transfer.parquet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tailored_llama.artifacts import read_table, schema_of
from tailored_llama.config import RunConfig
from tailored_llama.config_loading import load_config
from tailored_llama.errors import InputError
from tailored_llama.recovery import MEAN, check_comparable, read_score
from tailored_llama.statistics import Answers, above_floor, interval, paired_draws

DENSE, PRUNED, GENERIC = "dense", "pruned (untuned)", "generic"
UNREAD = ("perplexity", "profile")  # sections that change nothing here
# In the place of a model or a benchmark; none can be called that, as a name has no parentheses.
OWN, OTHERS, DIFFERENCE = "(own)", "(others)", "(own − others)"


@dataclass(frozen=True)
class Cell:
    """One model on one benchmark: the folder that `score_benchmark` wrote, or why there is none.

    `model` is the benchmark that the model's adapter was tuned on, or the name of any other model.
    """

    model: str
    benchmark: str
    scores: Path | None = None
    error: str | None = None


@dataclass(frozen=True)
class Row:
    """One row of `transfer.parquet`: a cell, or a mean gain over several.

    Accuracies and gains are shares, not points; `gain` is over the pruned model, `_low` and `_high` bound its 95 %
    interval. With the benchmark "(others)": a model's mean gain on those that it was not tuned on. With the benchmark
    "(mean)": the mean gain of adapters on their "(own)" benchmark, on "(others)", and the difference.
    """

    model: str
    benchmark: str
    metric: str | None = None
    examples: int | None = None
    floor: float | None = None
    accuracy: float | None = None
    stderr: float | None = None
    above_floor: bool | None = None
    benchmarks: int = 0  # that the gain is of
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    error: str | None = None

    @property
    def significant(self) -> bool:
        """Whether the interval of the gain excludes zero."""
        return self.gain_low is not None and self.gain_high is not None and self.gain_low * self.gain_high > 0


TRANSFER_SCHEMA = schema_of(Row)


def load_transfer(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run configuration that `check_transfer` finds fit.

    Raises:
        InputError: as `load_config` or `check_transfer`.
    """
    config = load_config(path, overrides)
    check_transfer(config)
    return config


def check_transfer(config: RunConfig) -> float:
    """The one ratio of the run.

    Raises:
        InputError: there are several ratios or only one benchmark, or a benchmark is called as another row.
    """
    names = [benchmark.name for benchmark in config.benchmarks]
    if len(config.pruning.ratios) > 1:
        raise InputError(f"pruning.ratios: got {list(config.pruning.ratios)}; allowed: one ratio")
    if config.tuning.examples != "benchmark":
        raise InputError(
            f"tuning.examples: got {config.tuning.examples!r}; allowed: 'benchmark'; a mixture is a row too"
        )
    if len(names) < 2:
        raise InputError(f"benchmarks: got {names[0]} alone; allowed: at least two, to tune on one and score on others")
    if taken := next((name for name in names if name in (DENSE, GENERIC)), None):
        raise InputError(f"benchmarks: got {taken!r}; allowed: another name, as one of the models is called that")
    return config.pruning.ratios[0]


def transfer_rows(cells: Sequence[Cell], seed: int) -> list[Row]:
    """Every cell in order, each model's mean gain on others, and the means on own and on other benchmarks.

    Intervals: paired bootstrap over the scored examples. A mean over benchmarks draws from each by itself; a mean over
    models on one benchmark draws the same examples for all of them.

    Raises:
        InputError: scores of one benchmark are of different examples or metrics, or a file is missing or broken.
    """
    scores = {(cell.model, cell.benchmark): read_score(cell.scores) for cell in cells if cell.scores}
    names = list(dict.fromkeys(cell.benchmark for cell in cells))
    models = dict.fromkeys(cell.model for cell in cells)
    for name in names:
        if column := [score for (_, benchmark), score in scores.items() if benchmark == name]:
            check_comparable(name, *column)
    answers = {place: score.answers for place, score in scores.items()}
    untuned = {name: answers[PRUNED, name] for name in names if (PRUNED, name) in answers}
    rows = []
    for cell in cells:
        row, score = Row(cell.model, cell.benchmark, error=cell.error), scores.get((cell.model, cell.benchmark))
        if score:
            here = {cell.benchmark: score.answers} if cell.model != PRUNED else {}
            row = Row(
                cell.model,
                cell.benchmark,
                score.metric,
                len(score.answers.examples),
                score.floor,
                score.accuracy,
                score.stderr,
                above_floor(score.accuracy, score.stderr, score.floor),
                **_gain(here, untuned, seed),
            )
        rows.append(row)
    for model in models:
        elsewhere = [name for name in names if model not in (name, PRUNED) and (model, name) in answers]
        rows.append(Row(model, OTHERS, **_gain({name: answers[model, name] for name in elsewhere}, untuned, seed)))
    strangers = {name: [answers[m, name] for m in names if m != name and (m, name) in answers] for name in names}
    both = [name for name in untuned if (name, name) in answers and strangers[name]]
    own, others = {name: answers[name, name] for name in both}, {name: _mean(strangers[name]) for name in both}
    for label, these, those in ((OWN, own, untuned), (OTHERS, others, untuned), (DIFFERENCE, own, others)):
        rows.append(Row(label, MEAN, **_gain(these, those, seed)))
    return rows


def _mean(models: Sequence[Answers]) -> Answers:
    """What several models are worth on average, example by example."""
    first = models[0]
    return Answers(first.examples, first.answers, np.mean([answers.values for answers in models], axis=0))


def _gain(these: Mapping[str, Answers], those: Mapping[str, Answers], seed: int) -> dict[str, Any]:
    """How much better, in the mean over benchmarks that both have, these answers are than those."""
    pairs = {name: (answers, those[name]) for name, answers in these.items() if name in those}
    if not pairs:
        return {}
    draws = [np.subtract(*paired_draws(*pair, [seed, *name.encode()])) for name, pair in pairs.items()]
    drawn = np.asarray(np.round(np.mean(draws, axis=0), 12))  # a draw without a difference is one of exactly zero
    gain = float(np.mean([one.values.mean() - other.values.mean() for one, other in pairs.values()]))
    low, high = interval(drawn)
    return {"benchmarks": len(pairs), "gain": gain, "gain_low": low, "gain_high": high}


def read_transfer(folder: Path) -> list[Row]:
    """The rows of `transfer.parquet`."""
    return [Row(**row) for row in read_table(folder / "transfer.parquet", TRANSFER_SCHEMA).to_pylist()]


def field_of(rows: Sequence[Row]) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    """Models (those without a benchmark of their own first), benchmarks, and rows by both."""
    field = {(row.model, row.benchmark): row for row in rows}
    names = list(dict.fromkeys(name for _, name in field if name not in (OTHERS, MEAN)))
    models = list(dict.fromkeys(model for model, name in field if name in names))
    return sorted(models, key=lambda model: model in names), names, field
