"""Prompt studies: choose a template set on a slice of the train split, report it on the evaluation split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailored_llama.config import REFERENCES, PromptStudyConfig, named_benchmark
from tailored_llama.data import layout_of, load_template, study_templates
from tailored_llama.evaluation.recovery import MEAN
from tailored_llama.evaluation.results import StudiedBenchmark
from tailored_llama.evaluation.scores import read_answers, read_metrics
from tailored_llama.evaluation.statistics import Estimate, difference, interval, mean_of

SELECTION, EVALUATION = "selection", "evaluation"


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


def choose(scores: Mapping[str, Sequence[Path]]) -> str:
    """The template set with the highest headline metric over all examples of its scores; on a tie, the first."""
    accuracies = {}
    for name, folders in scores.items():
        splits = [read_metrics(folder) for folder in folders]
        examples = [split["examples"] for split in splits]
        accuracies[name] = np.average([split[split["metric"]] for split in splits], weights=examples)
    return max(accuracies, key=lambda name: float(accuracies[name]))


def study_rows(config: PromptStudyConfig, studied: Sequence[StudiedBenchmark[Path]]) -> list[TemplateRow]:
    """One row for each score, benchmark by benchmark."""
    rows = []
    for one in studied:
        benchmark = named_benchmark(config, one.benchmark)
        named = study_templates(config, benchmark)
        for split, scores in ((SELECTION, one.selection), (EVALUATION, one.evaluation)):
            for name, folder in scores.items():
                values = read_metrics(folder)
                metric = values["metric"]
                partial = "choice" in layout_of(load_template(named[name]), benchmark).in_context
                figures = [values[key] for key in ("examples", "floor", metric, f"{metric}_stderr")]
                rows.append(TemplateRow(one.benchmark, split, name, name == one.chosen, partial, metric, *figures))
    return rows


def study_differences(
    config: PromptStudyConfig, studied: Sequence[StudiedBenchmark[Path]], rows: Sequence[TemplateRow]
) -> list[Difference]:
    """The chosen set minus each reference on every benchmark, and the mean if there are several benchmarks."""
    differences = []
    reported = {(row.benchmark, row.template): row for row in rows if row.split == EVALUATION}
    for other in REFERENCES:
        alike: list[tuple[Estimate, int]] = []  # on benchmarks where both sets use the same measure, with the examples
        for one in studied:
            name, chosen = one.benchmark, reported[one.benchmark, one.chosen]
            answers, others = (read_answers(one.evaluation[own], chosen.metric) for own in (one.chosen, other))
            gain = difference(answers, others, config.seed, name)
            same, bounds = chosen.partial == reported[name, other].partial, interval(gain.draws)
            differences.append(Difference(name, one.chosen, other, same, gain.value, *bounds, chosen.examples))
            if same:
                alike.append((gain, chosen.examples))
        if len(studied) > 1 and alike:
            mean, examples = mean_of([gain for gain, _ in alike]), sum(count for _, count in alike)
            bounds = interval(mean.draws)
            differences.append(Difference(MEAN, None, other, True, mean.value, *bounds, examples, len(alike)))
    return differences
