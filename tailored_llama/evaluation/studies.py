"""The rows of the studies: sweeps over a grid of settings, prompt studies and transfer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from tailored_llama.config import DENSE, REFERENCES, UNTUNED_MODEL, PromptStudyConfig, named_benchmark
from tailored_llama.data import layout_of, load_template, study_templates
from tailored_llama.evaluation.recovery import MEAN, TAILORED, RecoveryRow, recovery_rows
from tailored_llama.evaluation.results import MeasuredModel, StudiedBenchmark, TransferScore
from tailored_llama.evaluation.scores import check_comparable, read_answers, read_metrics, read_score
from tailored_llama.evaluation.statistics import Answers, Estimate, above_floor, difference, interval, mean_of
from tailored_llama.models import read_structure
from tailored_llama.store import read_rows

EVALUATION = "evaluation"  # split
# Stand where names of models or benchmarks do; no real name has parentheses.
OWN, OTHERS, DIFFERENCE = "(own)", "(others)", "(own − others)"


@dataclass(frozen=True)
class SweepRow:
    """The figures of a cell, or of several that differ only in their seed; or the error that left none.

    Sizes and perplexity are means over the seeds; recoveries, as in `RecoveryRow`, are from each example's mean over
    them. `_least` and `_most` are the extremes of single seeds. `dense_…` is of the cell's untuned dense model.
    """

    label: str
    ratio: float  # 0: a dense model
    curve: str | None = None  # of a dense model only if it is tuned
    place: float | None = None
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
    by_benchmark = []
    for recovery in recoveries:
        if recovery.benchmark != MEAN:
            by_benchmark.append(replace(recovery, model=row.label, ratio=row.ratio))
    return row, by_benchmark


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


def read_sweep(folder: Path) -> list[SweepRow]:
    """The rows of `sweep.parquet`, dense models first; InputError as `read_rows`."""
    return read_rows(folder / "sweep.parquet", SweepRow)


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
        """True if the interval of the gain excludes zero."""
        return self.gain_low is not None and self.gain_high is not None and self.gain_low * self.gain_high > 0


def transfer_rows(cells: Sequence[TransferScore[Path]], seed: int) -> list[TransferRow]:
    """Every cell in order, each model's mean gain on other benchmarks, and the means on own and other benchmarks.

    The interval of a mean over benchmarks draws the examples of each separately. A mean over models draws the same
    examples for all of them.

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
        if scored := scores.get((cell.model, cell.benchmark)):
            figures = (scored.metric, len(scored.answers.examples), scored.floor, scored.accuracy, scored.stderr)
            tuned = {cell.benchmark: scored.answers} if cell.model != UNTUNED_MODEL else {}
            significant = above_floor(scored.accuracy, scored.stderr, scored.floor)
            row = TransferRow(cell.model, cell.benchmark, *figures, significant, **_gain(tuned, untuned, seed))
        rows.append(row)
    for model, by_name in answers.items():
        elsewhere = {name: on_other for name, on_other in by_name.items() if model not in (name, UNTUNED_MODEL)}
        rows.append(TransferRow(model, OTHERS, **_gain(elsewhere, untuned, seed)))
    on_own, others = {}, {}
    for name in untuned:
        beside = [answers[model][name].values for model in names if model != name and name in answers.get(model, {})]
        if beside and name in answers.get(name, {}):
            on_own[name] = answers[name][name]
            others[name] = replace(on_own[name], values=np.mean(beside, axis=0))
    for label, compared, baseline in ((OWN, on_own, untuned), (OTHERS, others, untuned), (DIFFERENCE, on_own, others)):
        rows.append(TransferRow(label, MEAN, **_gain(compared, baseline, seed)))
    return rows


def _gain(answers: Mapping[str, Answers], baseline: Mapping[str, Answers], seed: int) -> dict[str, Any]:
    """The gain over a baseline as fields of a row: the mean over the benchmarks that both have."""
    gains = [difference(tuned, baseline[name], seed, name) for name, tuned in answers.items() if name in baseline]
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


@dataclass(frozen=True)
class TemplateRow:
    """A template set on one split of a benchmark."""

    benchmark: str
    split: str  # selection (a slice of train) or evaluation
    template: str
    chosen: bool
    partial: bool  # the choice is in the context, and the rest of the sentence is scored: another measure
    metric: str
    examples: int
    floor: float
    accuracy: float
    stderr: float


@dataclass(frozen=True)
class Difference:
    """Accuracy of the chosen set − another's on the same evaluation examples, with its paired 95 % interval."""

    benchmark: str  # or (mean)
    template: str | None  # chosen; None for the mean
    other: str
    same_measure: bool
    difference: float
    low: float
    high: float
    examples: int
    benchmarks: int = 1  # in a mean: those on which both sets use the same measure


def choose(scores: Mapping[str, Path]) -> str:
    """The template set with the highest headline metric; on a tie, the first."""
    measured = {name: read_metrics(folder) for name, folder in scores.items()}
    return max(measured, key=lambda name: measured[name][measured[name]["metric"]])


def study_rows(config: PromptStudyConfig, studied: Sequence[StudiedBenchmark[Path]]) -> list[TemplateRow]:
    """One row for each score, benchmark by benchmark."""
    rows = []
    for study in studied:
        benchmark = named_benchmark(config, study.benchmark)
        sources = study_templates(config, benchmark)
        for split, scores in (("selection", study.selection), (EVALUATION, study.evaluation)):
            for name, folder in scores.items():
                score, layout = read_score(folder), layout_of(load_template(sources[name]), benchmark)
                chosen, partial = name == study.chosen, "choice" in layout.in_context
                figures = (score.metric, len(score.answers.examples), score.floor, score.accuracy, score.stderr)
                rows.append(TemplateRow(study.benchmark, split, name, chosen, partial, *figures))
    return rows


def study_differences(
    config: PromptStudyConfig, studied: Sequence[StudiedBenchmark[Path]], rows: Sequence[TemplateRow]
) -> list[Difference]:
    """The chosen set minus each reference on every benchmark, and the mean if there are several benchmarks."""
    differences = []
    reported = {(row.benchmark, row.template): row for row in rows if row.split == EVALUATION}
    for other in REFERENCES:
        alike: list[tuple[Estimate, int]] = []  # on benchmarks where both sets use the same measure, with the examples
        for study in studied:
            name, chosen = study.benchmark, reported[study.benchmark, study.chosen]
            answers, others = (read_answers(study.evaluation[label], chosen.metric) for label in (study.chosen, other))
            gain = difference(answers, others, config.seed, name)
            same, bounds = chosen.partial == reported[name, other].partial, interval(gain.draws)
            differences.append(Difference(name, study.chosen, other, same, gain.value, *bounds, chosen.examples))
            if same:
                alike.append((gain, chosen.examples))
        if len(studied) > 1 and alike:
            mean, total = mean_of([gain for gain, _ in alike]), sum(examples for _, examples in alike)
            bounds = interval(mean.draws)
            differences.append(Difference(MEAN, None, other, True, mean.value, *bounds, total, len(alike)))
    return differences
