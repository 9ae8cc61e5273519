"""Recovery: what pruning cost and tuning brought back, as rows with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tailored_llama.config import DENSE
from tailored_llama.evaluation.scores import Score, check_comparable
from tailored_llama.evaluation.statistics import Array, above_floor, chance_corrected, interval, paired_draws, ratios
from tailored_llama.store import read_rows

PRUNED, HEALED, TAILORED = "pruned", "healed", "tailored"
MODELS = (DENSE, PRUNED, TAILORED)
MEAN = "(mean)"  # used as a benchmark's name; real names have no parentheses

Scores = Mapping[str, Mapping[str, Score]]  # by model and benchmark


@dataclass(frozen=True)
class RecoveryRow:
    """One row of `recovery.parquet`: a model on a benchmark, or its mean over all benchmarks.

    Accuracies and their ratios are fractions, not percentages; `_low` and `_high` bound a 95 % interval. None means not
    measured or not meaningful: there is no chance-corrected recovery if the dense model is not significantly above its
    floor, and no mean accuracy for a model that was not scored on every benchmark.
    """

    ratio: float | None  # as configured
    model: str  # dense, pruned, tailored; if scored, healed, "dense, tuned", and with a type: "tailored q8_0"
    benchmark: str  # or (mean)
    metric: str | None
    examples: int
    floor: float
    accuracy: float | None = None
    stderr: float | None = None
    above_floor: bool | None = None  # significantly
    gain: float | None = None  # tailored − pruned
    gain_low: float | None = None
    gain_high: float | None = None
    recovery: float | None = None  # accuracy ÷ the dense model's
    recovery_low: float | None = None
    recovery_high: float | None = None
    recovery_benchmarks: int = 0  # number of benchmarks in the recovery
    chance_corrected: float | None = None
    cc_low: float | None = None
    cc_high: float | None = None
    cc_benchmarks: int = 0
    bytes: int | None = None  # of its GGUF file, if those weights were scored
    seed: int = 0
    template: str | None = None  # that a sweep searched for; if seeds differ, every one


@dataclass(frozen=True)
class ModelRow:
    """One row of `models.parquet`: a model's size, its perplexity, and its speed relative to the dense model."""

    ratio: float | None  # None: the dense model
    model: str  # dense, pruned or healed
    parameters: int | None = None
    perplexity: float | None = None
    prefill_speedup: float | None = None  # dense seconds ÷ its own: the median of the pairs at the largest batch
    prefill_speedup_low: float | None = None  # the lowest and the highest of the pairs
    prefill_speedup_high: float | None = None
    decode_speedup: float | None = None
    decode_speedup_low: float | None = None
    decode_speedup_high: float | None = None
    body: int | None = None  # parameters without the embedding and an untied head
    vocab_size: int | None = None
    byte_perplexity: float | None = None
    whole: float | None = None  # share of the dense model's tokens of the perplexity text that it has


_BOUNDS = {"gain": "gain", "recovery": "recovery", "chance_corrected": "cc"}  # field → prefix of its bounds


def recovery_rows(scores: Scores, ratio: float | None = None, seed: int = 0) -> list[RecoveryRow]:
    """A row for each model and benchmark, and the mean of each model if there are several benchmarks.

    The mean recovery is over all benchmarks that have one. The mean chance-corrected recovery is over those where the
    dense model is significantly above its floor. Intervals come from a paired bootstrap, which does not depend on what
    other benchmarks are reported; that of a mean resamples every benchmark. `ratio` is the configured one.

    Raises:
        InputError: scores of a benchmark have different examples or metrics.
    """
    benchmarks = list(dict.fromkeys(name for model in scores.values() for name in model))
    rows: dict[str, list[RecoveryRow]] = {model: [] for model in scores}
    draws: dict[str, list[dict[str, Array]]] = {model: [] for model in scores}
    for name in benchmarks:
        by_model = {model: by_name[name] for model, by_name in scores.items() if name in by_name}
        check_comparable(name, *by_model.values())
        for model in by_model:
            row, drawn = _row(model, name, by_model, [seed, *name.encode()])
            rows[model].append(row)
            draws[model].append(drawn)
    for model, own in rows.items():
        if own and len(benchmarks) > 1:
            own.append(_mean(own, draws[model], benchmarks))
    return [replace(row, ratio=ratio, seed=seed) for own in rows.values() for row in own]


def _row(
    model: str, name: str, scores: Mapping[str, Score], seed: Sequence[int]
) -> tuple[RecoveryRow, dict[str, Array]]:
    """One model on one benchmark, compared with the others."""
    score, dense, pruned = scores[model], scores.get(DENSE), scores.get(PRUNED)
    values: dict[str, Any] = {"accuracy": score.accuracy, "stderr": score.stderr, "bytes": score.bytes}
    values["above_floor"] = above_floor(score.accuracy, score.stderr, score.floor)
    draws: dict[str, Array] = {}
    if model == TAILORED and pruned:
        values["gain"] = score.accuracy - pruned.accuracy
        draws["gain"] = np.subtract(*paired_draws(score.answers, pruned.answers, seed))
    if model != DENSE and dense and dense.accuracy > 0:
        pair = paired_draws(score.answers, dense.answers, seed)
        values |= {"recovery": score.accuracy / dense.accuracy, "recovery_benchmarks": 1}
        draws["recovery"] = ratios(*pair)
        if above_floor(dense.accuracy, dense.stderr, dense.floor):
            corrected = chance_corrected(score.accuracy, dense.accuracy, dense.floor)
            values |= {"chance_corrected": corrected, "cc_benchmarks": 1}
            draws["chance_corrected"] = ratios(*pair, dense.floor)
    values |= _bounds(draws)
    return RecoveryRow(None, model, name, score.metric, len(score.answers.examples), score.floor, **values), draws


def _bounds(draws: Mapping[str, Array]) -> dict[str, Any]:
    """The 95 % intervals of draws, as fields of a row."""
    bounds: dict[str, Any] = {}
    for field, values in draws.items():
        low, high = (None if math.isnan(end) else end for end in interval(values))
        bounds |= {f"{_BOUNDS[field]}_low": low, f"{_BOUNDS[field]}_high": high}
    return bounds


def _mean(rows: Sequence[RecoveryRow], draws: Sequence[Mapping[str, Array]], benchmarks: Sequence[str]) -> RecoveryRow:
    """A model's mean over the benchmarks; every benchmark counts the same."""
    values: dict[str, Any] = {}
    if len(rows) == len(benchmarks):
        values["accuracy"] = float(np.mean([row.accuracy for row in rows]))
        values["stderr"] = math.hypot(*(row.stderr or 0.0 for row in rows)) / len(rows)
    drawn: dict[str, Array] = {}
    for field in _BOUNDS:
        known = [value for row in rows if (value := getattr(row, field)) is not None]
        if not known or (field == "gain" and len(known) < len(benchmarks)):
            continue
        values[field] = float(np.mean(known))
        with np.errstate(invalid="ignore"):  # ∞ − ∞, if resamples of two benchmarks are unbounded
            drawn[field] = np.mean([one[field] for one in draws if field in one], axis=0)
    for field in ("examples", "recovery_benchmarks", "cc_benchmarks"):
        values[field] = sum(getattr(row, field) for row in rows)
    values["bytes"] = max((row.bytes for row in rows if row.bytes), default=None)  # a file for each benchmark
    floor = float(np.mean([row.floor for row in rows]))
    return RecoveryRow(None, rows[0].model, MEAN, None, floor=floor, **values, **_bounds(drawn))


@dataclass(frozen=True)
class RecoveryTable:
    """The results at one ratio: rows by model and benchmark, and the size and perplexity of each model."""

    ratio: float | None
    rows: tuple[RecoveryRow, ...]
    models: Mapping[str, ModelRow]

    @property
    def benchmarks(self) -> list[str]:
        """The scored benchmarks in order, without the mean."""
        return [name for name in dict.fromkeys(row.benchmark for row in self.rows) if name != MEAN]

    @property
    def lines(self) -> list[str]:
        """The benchmarks, followed by the mean if there are several."""
        return self.benchmarks + [MEAN] * (len(self.benchmarks) > 1)

    def row(self, model: str, benchmark: str) -> RecoveryRow | None:
        """A model's row on a benchmark, if it was scored there."""
        return next((row for row in self.rows if (row.model, row.benchmark) == (model, benchmark)), None)

    def any_row(self, benchmark: str) -> RecoveryRow:
        """A row on a benchmark, for the fields that all models share: metric, examples and floor."""
        return next(row for row in self.rows if row.benchmark == benchmark)

    def overall(self, model: str) -> RecoveryRow | None:
        """A model's row on the only benchmark, or its mean."""
        return self.row(model, self.lines[-1])

    def size(self, model: str) -> ModelRow:
        """A model's size, perplexity and speed, as far as they are known."""
        return self.models.get(model, ModelRow(self.ratio, model))


def recovery_tables(rows: Sequence[RecoveryRow], models: Sequence[ModelRow]) -> list[RecoveryTable]:
    """One table for each ratio, in order; each includes the dense model."""
    return [
        RecoveryTable(
            ratio,
            tuple(row for row in rows if row.ratio == ratio),
            {model.model: model for model in models if model.ratio == ratio or model.model == DENSE},
        )
        for ratio in dict.fromkeys(row.ratio for row in rows)
    ]


def read_recovery(folder: Path) -> tuple[list[RecoveryRow], list[ModelRow]]:
    """The rows of `recovery.parquet` and of `models.parquet`.

    Raises:
        InputError: one of them is missing, broken or of another schema.
    """
    return read_rows(folder / "recovery.parquet", RecoveryRow), read_rows(folder / "models.parquet", ModelRow)
