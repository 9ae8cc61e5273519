"""Recovery: what pruning cost and tuning brought back, as rows with 95 % intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tailored_llama.config import DENSE
from tailored_llama.evaluation.scores import Score, check_comparable
from tailored_llama.evaluation.statistics import (
    Estimate,
    above_floor,
    chance_corrected,
    difference,
    interval,
    mean_of,
    paired_draws,
    ratios,
)
from tailored_llama.store import read_rows

PRUNED, TAILORED = "pruned", "tailored"
MODELS = (DENSE, PRUNED, TAILORED)
MEAN = "(mean)"  # used as a benchmark's name; real names have no parentheses

Scores = Mapping[str, Mapping[str, Score]]  # by model and benchmark


@dataclass(frozen=True)
class RecoveryRow:
    """One row of `recovery.parquet`: a model on a benchmark, or its mean over all benchmarks.

    Accuracies and their ratios are fractions; `_low` and `_high` bound a 95 % interval. None: not measured, or says
    nothing, as a chance-corrected recovery does where the dense model is not significantly above its floor.
    """

    ratio: float | None  # as configured
    model: str  # dense, pruned, tailored; if scored, "dense, tuned", and with a type: "tailored q8_0"
    benchmark: str  # or (mean)
    metric: str | None
    examples: int
    floor: float
    accuracy: float | None = None  # no mean of a model that was not scored on every benchmark
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


@dataclass(frozen=True)
class ModelRow:
    """One row of `models.parquet`: a model's size and its perplexity."""

    ratio: float | None  # None: the dense model
    model: str  # dense or pruned
    parameters: int | None = None
    perplexity: float | None = None
    body: int | None = None  # parameters without the embedding and an untied head
    vocab_size: int | None = None
    byte_perplexity: float | None = None
    whole: float | None = None  # share of the dense model's tokens of the perplexity text that it has


# figure → prefix of its bounds and counts
_PREFIXES = {"gain": "gain", "recovery": "recovery", "chance_corrected": "cc"}


def recovery_rows(scores: Scores, ratio: float | None = None, seed: int = 0) -> list[RecoveryRow]:
    """A row for each model and benchmark, and the mean of each model if there are several benchmarks.

    The mean recovery is over all benchmarks that have one. The mean chance-corrected recovery is over those where the
    dense model is significantly above its floor. Intervals come from a paired bootstrap, which does not depend on what
    other benchmarks are reported; that of a mean resamples every benchmark. `ratio` is the configured one.

    Raises:
        InputError: scores of a benchmark have different examples or metrics.
    """
    benchmarks = list(dict.fromkeys(name for of_model in scores.values() for name in of_model))
    for name in benchmarks:
        check_comparable(name, *(of_model[name] for of_model in scores.values() if name in of_model))
    rows: list[RecoveryRow] = []
    for model, of_model in scores.items():
        estimates = {name: _estimates(model, name, scores, seed) for name in benchmarks if name in of_model}
        rows += [_row(model, name, [of_model[name]], [figures]) for name, figures in estimates.items()]
        if estimates and len(benchmarks) > 1:
            by_benchmark = [estimates.get(name, {}) for name in benchmarks]
            rows.append(_row(model, MEAN, [of_model[name] for name in estimates], by_benchmark))
    return [replace(row, ratio=ratio, seed=seed) for row in rows]


def _estimates(model: str, name: str, scores: Scores, seed: int) -> dict[str, Estimate]:
    """One model on one benchmark, compared with the others."""
    score, dense, pruned = scores[model][name], *(scores.get(other, {}).get(name) for other in (DENSE, PRUNED))
    estimates: dict[str, Estimate] = {}
    if model == TAILORED and pruned:
        estimates["gain"] = difference(score.answers, pruned.answers, seed, name)
    if model != DENSE and dense and dense.accuracy > 0:
        pair = paired_draws(score.answers, dense.answers, seed, name)
        estimates["recovery"] = Estimate(score.accuracy / dense.accuracy, ratios(*pair))
        if above_floor(dense.accuracy, dense.stderr, dense.floor):
            corrected = chance_corrected(score.accuracy, dense.accuracy, dense.floor)
            estimates["chance_corrected"] = Estimate(corrected, ratios(*pair, dense.floor))
    return estimates


def _row(
    model: str, benchmark: str, scores: Sequence[Score], estimates: Sequence[Mapping[str, Estimate]]
) -> RecoveryRow:
    """A model on one benchmark, or its mean over those that are known: every benchmark counts the same."""
    examples = sum(len(score.answers.examples) for score in scores)
    floor = float(np.mean([score.floor for score in scores]))
    size = max((score.bytes for score in scores if score.bytes), default=None)  # there is a file for each benchmark
    row = RecoveryRow(None, model, benchmark, None, examples, floor, bytes=size)
    if len(scores) == len(estimates):
        stderr = math.hypot(*(score.stderr for score in scores)) / len(scores)
        row = replace(row, accuracy=float(np.mean([score.accuracy for score in scores])), stderr=stderr)
    if benchmark != MEAN:
        (score,) = scores
        row = replace(row, metric=score.metric, above_floor=above_floor(score.accuracy, score.stderr, floor))
    for figure, prefix in _PREFIXES.items():
        known = [by_figure[figure] for by_figure in estimates if figure in by_figure]
        if not known or (figure == "gain" and len(known) < len(estimates)):
            continue
        mean = mean_of(known)
        low, high = (None if math.isnan(end) else end for end in interval(mean.draws))
        fields: dict[str, Any] = {figure: mean.value, f"{prefix}_low": low, f"{prefix}_high": high}
        if figure != "gain":
            fields[f"{prefix}_benchmarks"] = len(known)
        row = replace(row, **fields)
    return row


def read_recovery(folder: Path) -> tuple[list[RecoveryRow], list[ModelRow]]:
    """The rows of `recovery.parquet` and of `models.parquet`; InputError as `read_rows`."""
    return read_rows(folder / "recovery.parquet", RecoveryRow), read_rows(folder / "models.parquet", ModelRow)
