"""Recovery: what was kept and what was lost, as rows of `recovery.parquet`, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tailored_llama import profiling
from tailored_llama.artifacts import read_table, schema_of
from tailored_llama.config import RunConfig
from tailored_llama.errors import InputError
from tailored_llama.scoring import metrics, read_answers, read_metrics
from tailored_llama.statistics import (
    Answers,
    above_floor,
    chance_corrected,
    check_same_examples,
    interval,
    mcnemar,
    paired_draws,
    ratios,
    recovery,
)

MODELS = ("dense", "pruned", "tailored")
MEAN = "(mean)"  # no benchmark can be called that: a name has no parentheses


@dataclass(frozen=True)
class ModelScores:
    """One model (dense, pruned or tailored): its size, its perplexity, its scores.

    `perplexity` is what `measure_perplexity` wrote; `scores` maps a benchmark's name to the folder that
    `score_benchmark` wrote, or to those of several seeds, which count as one model that answers as they do on average.
    """

    checkpoint_parameters: int | None = None
    perplexity: Mapping[str, Any] | None = None
    scores: Mapping[str, Path | Sequence[Path]] = field(default_factory=dict)


@dataclass(frozen=True)
class PrunedRun:
    """One pruned checkpoint and what was tuned on it.

    `ratio` is the one asked; `tailored` holds the scores with the adapters; `healed_perplexity` is the healed model's,
    where pruning was followed by healing; `plan` is the folder with `plan.parquet`; `logs` maps a benchmark to the
    adapter folder with `log.parquet`; `profile` is what it costs to run beside the dense model.
    """

    ratio: float | None
    pruned: ModelScores = field(default_factory=ModelScores)
    tailored: ModelScores = field(default_factory=ModelScores)
    plan: Path | None = None
    logs: Mapping[str, Path] = field(default_factory=dict)
    profile: Sequence[profiling.Row] = ()
    healed_perplexity: Mapping[str, Any] | None = None

    def speed(self, role: str = "checkpoint") -> profiling.Row | None:
        """What was timed at the largest batch, of the pruned model or of the dense one ("against")."""
        return max((row for row in self.profile if row.role == role), key=lambda row: row.batch, default=None)


@dataclass(frozen=True)
class Cost:
    """What one artifact cost: wall time in seconds, peak resident memory in bytes, and what its stage measured."""

    stage: str
    label: str
    seconds: float
    peak_memory_bytes: int
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportInputs:
    """All that a report is made of; `importance` has `importance.parquet`, each of `prompts` has `samples.txt`."""

    config: RunConfig | None
    model: str
    dense: ModelScores
    runs: tuple[PrunedRun, ...] = ()
    importance: Path | None = None
    prompts: Mapping[str, Path] = field(default_factory=dict)
    costs: tuple[Cost, ...] = ()
    libraries: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row of `recovery.parquet`: a benchmark at a ratio, or the mean over the ratio's benchmarks.

    Accuracies and ratios of them are shares, not percentages; `_low` and `_high` bound a 95 % interval. None is what
    was not measured, or says nothing: a chance-corrected recovery where dense is not significantly above its floor.
    """

    ratio: float | None  # asked
    benchmark: str  # or (mean)
    metric: str | None
    examples: int
    floor: float
    dense: float | None = None
    dense_stderr: float | None = None
    pruned: float | None = None
    pruned_stderr: float | None = None
    tailored: float | None = None
    tailored_stderr: float | None = None
    gain: float | None = None  # tailored − pruned
    gain_low: float | None = None
    gain_high: float | None = None
    recovery: float | None = None
    recovery_low: float | None = None
    recovery_high: float | None = None
    chance_corrected: float | None = None
    cc_low: float | None = None
    cc_high: float | None = None
    dense_above_floor: bool | None = None
    dense_parameters: int | None = None
    pruned_parameters: int | None = None
    dense_perplexity: float | None = None
    pruned_perplexity: float | None = None
    healed_perplexity: float | None = None
    prefill_speedup: float | None = None  # dense seconds ÷ pruned seconds, at the largest batch that was timed
    decode_speedup: float | None = None
    dense_answer_perplexity: float | None = None  # of accepted answers, where the model writes them
    pruned_answer_perplexity: float | None = None
    tailored_answer_perplexity: float | None = None
    seed: int | None = None
    recovery_benchmarks: int = 0  # how many benchmarks the recovery rests on
    cc_benchmarks: int = 0  # and the chance-corrected one


RECOVERY_SCHEMA = schema_of(Row)


@dataclass(frozen=True)
class Score:
    """One model on one benchmark, in the headline metric; `perplexity` is that of accepted written answers."""

    metric: str
    floor: float
    accuracy: float
    stderr: float
    answers: Answers
    perplexity: float | None = None


def read_rows(folder: Path) -> list[Row]:
    """The rows of `recovery.parquet`."""
    return [Row(**row) for row in read_table(folder / "recovery.parquet", RECOVERY_SCHEMA).to_pylist()]


def recovery_rows(inputs: ReportInputs) -> list[Row]:
    """The table: for each run a row per benchmark and, where there are several, their mean.

    The mean recovery is over all benchmarks that have one, the mean chance-corrected recovery over those where dense
    is significantly above its floor. Intervals: paired bootstrap; that of a mean resamples every benchmark.

    Raises:
        InputError: scores to be compared are of different examples or metrics, or a file is missing or broken.
    """
    return [row for _, found in scored_runs(inputs) for row in found]


def scored_runs(inputs: ReportInputs) -> list[tuple[PrunedRun, list[Row]]]:
    """Each run that has scores, with its rows as `recovery_rows` describes them."""
    runs = [(run, list(_run_rows(inputs, run))) for run in inputs.runs or (PrunedRun(None),)]
    if not any(rows for _, rows in runs):
        raise InputError("report: no model has scores; allowed: at least one scored benchmark")
    return [(run, rows) for run, rows in runs if rows]


def _run_rows(inputs: ReportInputs, run: PrunedRun) -> Iterator[Row]:
    models = dict(zip(MODELS, (inputs.dense, run.pruned, run.tailored), strict=True))
    speed = run.speed()
    blank = Row(
        ratio=run.ratio,
        benchmark=MEAN,
        metric=None,
        examples=0,
        floor=0.0,
        dense_parameters=inputs.dense.checkpoint_parameters,
        pruned_parameters=run.pruned.checkpoint_parameters,
        dense_perplexity=(inputs.dense.perplexity or {}).get("perplexity"),
        pruned_perplexity=(run.pruned.perplexity or {}).get("perplexity"),
        healed_perplexity=(run.healed_perplexity or {}).get("perplexity"),
        prefill_speedup=speed.prefill_speedup if speed else None,
        decode_speedup=speed.decode_speedup if speed else None,
        seed=inputs.config.seed if inputs.config else None,
    )
    rows: list[Row] = []
    draws: dict[str, list[Any]] = {"gain": [], "recovery": [], "cc": []}  # per benchmark, float [resamples]
    for name in dict.fromkeys(name for model in models.values() for name in model.scores):
        scores = {key: read_score(model.scores[name]) for key, model in models.items() if name in model.scores}
        row = _benchmark_row(name, scores, blank)
        seed = [row.seed or 0, *name.encode()]  # an interval does not depend on which other benchmarks are reported
        if row.gain is not None:
            tuned, untuned = paired_draws(scores["tailored"].answers, scores["pruned"].answers, seed)
            draws["gain"].append(tuned - untuned)
            row = _with_interval(row, "gain", draws["gain"][-1])
        if row.recovery is not None:
            pair = paired_draws(scores["tailored"].answers, scores["dense"].answers, seed)
            draws["recovery"].append(ratios(*pair))
            row = _with_interval(row, "recovery", draws["recovery"][-1])
            if row.chance_corrected is not None:
                draws["cc"].append(ratios(*pair, row.floor))
                row = _with_interval(row, "cc", draws["cc"][-1])
        rows.append(row)
    yield from rows
    if len(rows) > 1:
        mean = _mean_row(rows, blank)
        with np.errstate(invalid="ignore"):  # ∞ − ∞, where a resample of one benchmark has no bound
            for name, values in draws.items():
                if values and getattr(mean, "chance_corrected" if name == "cc" else name) is not None:
                    mean = _with_interval(mean, name, np.mean(values, axis=0))
        yield mean


def read_score(folders: Path | Sequence[Path]) -> Score:
    """What `score_benchmark` wrote; or of several of the same examples their mean, example by example.

    Raises:
        InputError: a file is missing or broken, or the examples differ.
    """
    first, *others = [_read_one(folder) for folder in ([folders] if isinstance(folders, Path) else folders)]
    if not others:
        return first
    check_comparable("several seeds", first, *others)
    values = np.mean([first.answers.values, *(other.answers.values for other in others)], axis=0)
    answers = replace(first.answers, values=values)
    found = metrics({"mean": values})
    perplexities = [score.perplexity for score in (first, *others) if score.perplexity is not None]
    mean = float(np.mean(perplexities)) if perplexities else None
    return replace(first, accuracy=found["mean"], stderr=found["mean_stderr"], answers=answers, perplexity=mean)


def _read_one(folder: Path) -> Score:
    found = read_metrics(folder)
    metric = found.get("metric")
    try:
        floor, accuracy, stderr = (float(found[key]) for key in ("floor", str(metric), f"{metric}_stderr"))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{folder / 'metrics.json'}: floor, metric or its value is missing") from None
    answers = read_answers(folder, str(metric))
    return Score(str(metric), floor, accuracy, stderr, answers, found.get("answer_perplexity"))


def _benchmark_row(name: str, scores: Mapping[str, Score], blank: Row) -> Row:
    first = next(iter(scores.values()))
    check_comparable(name, *scores.values())
    values: dict[str, Any] = {key: score.accuracy for key, score in scores.items()}
    values |= {f"{key}_stderr": score.stderr for key, score in scores.items()}
    values |= {f"{key}_answer_perplexity": score.perplexity for key, score in scores.items()}
    if "tailored" in scores and "pruned" in scores:
        values["gain"] = scores["tailored"].accuracy - scores["pruned"].accuracy
    if dense := scores.get("dense"):
        values["dense_above_floor"] = above_floor(dense.accuracy, dense.stderr, dense.floor)
        if (tailored := scores.get("tailored")) and dense.accuracy > 0:
            values |= {"recovery": recovery(tailored.accuracy, dense.accuracy), "recovery_benchmarks": 1}
            if values["dense_above_floor"]:
                corrected = chance_corrected(tailored.accuracy, dense.accuracy, dense.floor)
                values |= {"chance_corrected": corrected, "cc_benchmarks": 1}
    count = len(first.answers.examples)
    return replace(blank, benchmark=name, metric=first.metric, examples=count, floor=first.floor, **values)


def check_comparable(name: str, first: Score, *others: Score) -> None:
    """Check that models answered the same examples of a benchmark, and are judged by one metric.

    Raises:
        InputError: they are not.
    """
    for other in others:
        if other.metric != first.metric:
            raise InputError(f"scores of {name}: {first.metric} against {other.metric}; allowed: one metric")
        try:
            check_same_examples(first.answers, other.answers)
        except ValueError as error:
            raise InputError(f"scores of {name}: {error}; allowed: scores of the same examples") from None


def _with_interval(row: Row, name: str, draws: Any) -> Row:
    low, high = (None if math.isnan(end) else end for end in interval(draws))
    changes: dict[str, Any] = {f"{name}_low": low, f"{name}_high": high}
    return replace(row, **changes)


def _mean_row(rows: Sequence[Row], blank: Row) -> Row:
    values: dict[str, Any] = {}
    for name in MODELS:
        accuracies = [getattr(row, name) for row in rows]
        if None not in accuracies:  # a model that was not scored everywhere has no mean to set beside the others
            values[name] = float(np.mean(accuracies))
            values[f"{name}_stderr"] = math.hypot(*(getattr(row, f"{name}_stderr") for row in rows)) / len(rows)
    if values.keys() >= {"tailored", "pruned"}:
        values["gain"] = values["tailored"] - values["pruned"]
    for name, count in (("recovery", "recovery_benchmarks"), ("chance_corrected", "cc_benchmarks")):
        known = [value for row in rows if (value := getattr(row, name)) is not None]
        values |= {name: float(np.mean(known)) if known else None, count: len(known)}
    examples, floor = sum(row.examples for row in rows), float(np.mean([row.floor for row in rows]))
    return replace(blank, examples=examples, floor=floor, **values)


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Two scores of the same examples: the difference other − one, its 95 % interval, and McNemar's p.

    Args:
        one: what `score_benchmark` wrote for a model; `other` for another, or the same after a change.

    Returns:
        `low` and `high` by paired bootstrap; `p` is None where answers are not just right or wrong (F1).

    Raises:
        InputError: the scores are of different benchmarks, metrics or examples, or a file is missing or broken.
    """
    named = [read_metrics(folder).get("benchmark") for folder in (one, other)]
    if named[0] != named[1]:
        raise InputError(f"scores: {named[0]} against {named[1]}; allowed: one benchmark")
    scores = [read_score(folder) for folder in (one, other)]
    check_comparable(str(named[0]), *scores)
    before, after = scores
    drawn_after, drawn_before = paired_draws(after.answers, before.answers, seed=0)
    low, high = interval(drawn_after - drawn_before)
    return {
        "benchmark": named[0],
        "metric": before.metric,
        "examples": len(before.answers.examples),
        "one": before.accuracy,
        "other": after.accuracy,
        "difference": after.accuracy - before.accuracy,
        "low": low,
        "high": high,
        "p": mcnemar(before.answers, after.answers) if before.metric != "f1" else None,
    }


def by_run(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each run, in order; where a run has several, the last is their mean."""
    runs: list[list[Row]] = []
    for row in rows:
        if not runs or runs[-1][-1].benchmark == MEAN or runs[-1][-1].ratio != row.ratio:
            runs.append([])
        runs[-1].append(row)
    return runs
