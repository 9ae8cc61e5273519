"""Prompt studies: choose a template set on a slice of the train split, report it on the evaluation split.

The paper asks how much a prompt written for the task gains over one prompt for all tasks. The choice never sees the
split that it is reported on.
"""

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
from tailored_llama.evaluation.statistics import interval, paired_draws

SELECTION, EVALUATION = "selection", "evaluation"


@dataclass(frozen=True)
class TemplateRow:
    """A template set on one split of a benchmark. With `partial`, the choice is in the context: another measure."""

    benchmark: str
    split: str  # selection (a slice of train) or evaluation
    template: str
    chosen: bool
    partial: bool
    metric: str
    examples: int
    floor: float
    accuracy: float
    stderr: float


@dataclass(frozen=True)
class Difference:
    """Accuracy of the chosen set − another's on the same evaluation examples, with its paired 95 % interval.

    The mean is over the benchmarks on which both sets use the same measure; `benchmarks` counts them.
    """

    benchmark: str  # or (mean)
    template: str | None  # chosen; None for the mean
    other: str
    same_measure: bool
    difference: float
    low: float
    high: float
    examples: int
    benchmarks: int = 1


def choose(scores: Mapping[str, Sequence[Path]]) -> str:
    """The template set with the highest headline metric over all examples of its scores; on a tie, the first."""

    def over_all(name: str) -> float:
        splits = [read_metrics(folder) for folder in scores[name]]
        examples = [split["examples"] for split in splits]
        return float(np.average([split[split["metric"]] for split in splits], weights=examples))

    return max(scores, key=over_all)


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
                measure = (name == one.chosen, partial, metric)
                rows.append(TemplateRow(one.benchmark, split, name, *measure, *figures))
    return rows


def study_differences(
    config: PromptStudyConfig, studied: Sequence[StudiedBenchmark[Path]], rows: Sequence[TemplateRow]
) -> list[Difference]:
    """The chosen set minus each reference on every benchmark, and the mean if there are several benchmarks."""
    differences = []
    reported = {(row.benchmark, row.template): row for row in rows if row.split == EVALUATION}
    for other in REFERENCES:
        draws, comparable = [], []
        for one in studied:
            name = one.benchmark
            chosen, reference = reported[name, one.chosen], reported[name, other]
            a, b = (read_answers(one.evaluation[template], chosen.metric) for template in (one.chosen, other))
            drawn = np.subtract(*paired_draws(a, b, [config.seed, *name.encode()]))
            gain, same_measure = chosen.accuracy - reference.accuracy, chosen.partial == reference.partial
            measured = (same_measure, gain, *interval(drawn), chosen.examples)
            differences.append(Difference(name, one.chosen, other, *measured))
            if same_measure:
                draws.append(drawn)
                comparable.append(differences[-1])
        if len(studied) > 1 and comparable:
            mean, total = float(np.mean([d.difference for d in comparable])), sum(d.examples for d in comparable)
            bounds = interval(np.mean(draws, axis=0))
            differences.append(Difference(MEAN, None, other, True, mean, *bounds, total, len(comparable)))
    return differences
