"""Prompt studies: a template set chosen on a slice of the train split, and reported on the evaluation split.

What the paper asks: how much a prompt written for the task gains over one and the same for all. The choice never sees
the split it is reported on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from tailored_llama.artifacts import read_table, schema_of
from tailored_llama.config import BenchmarkConfig, RunConfig
from tailored_llama.config_loading import read_config_data, validate_as
from tailored_llama.errors import InputError
from tailored_llama.own import is_written
from tailored_llama.recovery import MEAN
from tailored_llama.scoring import read_answers, read_metrics
from tailored_llama.statistics import interval, mcnemar, paired_draws
from tailored_llama.templates import GENERIC, layout_of, load_template, shipped, shows_choices

REFERENCES = (GENERIC, "harness")  # what the chosen set is reported beside
SELECTION, EVALUATION = "selection", "evaluation"


class PromptStudyConfig(RunConfig):
    """A run configuration, the template sets to choose among, and what they are chosen on."""

    templates: tuple[str, ...] = Field(
        (),
        description="Template sets to choose among: shipped names or .toml files. Of equals the first is taken. "
        "Absent: all shipped ones that suit the benchmark.",
    )
    examples: int = Field(
        200,
        ge=1,
        description="Train examples of each benchmark to choose on, drawn by seed from those that are neither tuned on "
        "nor held out.",
    )
    pruned: bool = Field(False, description="Study the model pruned at the run's single ratio, not the dense one.")


@dataclass(frozen=True)
class Row:
    """A template set on one split of a benchmark. With `partial`, the choice stands in the context: another measure."""

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

    The mean is over the benchmarks on which both sets measure the same; `benchmarks` counts them. `p` is McNemar's, and
    None of the mean and where answers are not just right or wrong.
    """

    benchmark: str  # or (mean)
    template: str | None  # chosen; None of the mean
    other: str
    same_measure: bool
    difference: float
    low: float
    high: float
    p: float | None
    examples: int
    benchmarks: int = 1


ROWS_SCHEMA, DIFFERENCES_SCHEMA = schema_of(Row), schema_of(Difference)


@dataclass(frozen=True)
class Studied:
    """What was scored of a benchmark: template set → folder, of the slice, of the evaluation split, and its prompts."""

    benchmark: BenchmarkConfig
    chosen: str
    selection: Mapping[str, Path]
    evaluation: Mapping[str, Path]
    prompts: Mapping[str, Path] = field(default_factory=dict)


def load_study(path: str | Path, overrides: list[str] | None = None) -> PromptStudyConfig:
    """Read a study's TOML file, as `load_config` reads a run's; every template set is checked.

    Raises:
        InputError: as `load_config`; or a set is unknown, broken, named twice, or cannot word a benchmark.
    """
    config = validate_as(PromptStudyConfig, read_config_data(path, overrides))
    if config.pruned and len(config.pruning.ratios) != 1:
        raise InputError(f"pruning.ratios: got {list(config.pruning.ratios)}; allowed: one ratio, where pruned = true")
    for benchmark in config.benchmarks:
        for source in sources(config, benchmark).values():
            layout_of(load_template(source, "templates"), benchmark)
    return config


def candidates(templates: Sequence[str], benchmark: BenchmarkConfig) -> dict[str, str]:
    """The sets to choose among for a benchmark: name → shipped name or file; where none is named, those that suit it.

    Raises:
        InputError: a set is unknown or broken, or two are called the same.
    """
    if not templates:
        return {name: name for name in shipped() if not (is_written(benchmark) and _lists(name, benchmark))}
    found: dict[str, str] = {}
    for source in templates:
        name = load_template(source, "templates").name
        if name in found or (name in REFERENCES and source != name):
            raise InputError(f"templates: got {source!r}, named {name!r}; allowed: a name that no other set has")
        found[name] = source
    return found


def sources(config: PromptStudyConfig, benchmark: BenchmarkConfig) -> dict[str, str]:
    """`candidates` and the references."""
    return candidates(config.templates, benchmark) | {name: name for name in REFERENCES}


def _lists(name: str, benchmark: BenchmarkConfig) -> bool:
    return shows_choices(load_template(name), benchmark)


def choose(scores: Mapping[str, Sequence[Path]]) -> str:
    """The template set of the highest headline metric, over all examples of its scores; of equals the first."""
    return max(scores, key=lambda name: _over_all([read_metrics(folder) for folder in scores[name]]))


def _over_all(found: Sequence[Mapping[str, Any]]) -> float:
    """The headline metric over the examples of several splits."""
    examples = [one["examples"] for one in found]
    return float(np.average([one[one["metric"]] for one in found], weights=examples))


def study_rows(config: PromptStudyConfig, studied: Sequence[Studied]) -> list[Row]:
    """Every score, benchmark by benchmark."""
    rows = []
    for one in studied:
        named = sources(config, one.benchmark)
        for split, scores in ((SELECTION, one.selection), (EVALUATION, one.evaluation)):
            for name, folder in scores.items():
                found = read_metrics(folder)
                metric = found["metric"]
                layout = layout_of(load_template(named[name]), one.benchmark)
                rows.append(
                    Row(
                        one.benchmark.name,
                        split,
                        name,
                        chosen=name == one.chosen,
                        partial="choice" in layout.in_context,
                        metric=metric,
                        examples=found["examples"],
                        floor=found["floor"],
                        accuracy=found[metric],
                        stderr=found[f"{metric}_stderr"],
                    )
                )
    return rows


def study_differences(config: PromptStudyConfig, studied: Sequence[Studied], rows: Sequence[Row]) -> list[Difference]:
    """The chosen set against each reference, benchmark by benchmark, and the mean where there are several."""
    found = []
    of = {(row.benchmark, row.template): row for row in rows if row.split == EVALUATION}
    for other in REFERENCES:
        draws, alike = [], []
        for one in studied:
            name = one.benchmark.name
            mine, theirs = of[name, one.chosen], of[name, other]
            a, b = (read_answers(one.evaluation[template], mine.metric) for template in (one.chosen, other))
            drawn = np.subtract(*paired_draws(a, b, [config.seed, *name.encode()]))
            difference = Difference(
                name,
                one.chosen,
                other,
                mine.partial == theirs.partial,
                mine.accuracy - theirs.accuracy,
                *interval(drawn),
                p=mcnemar(a, b) if mine.metric != "f1" else None,
                examples=mine.examples,
            )
            found.append(difference)
            if difference.same_measure:
                draws.append(drawn)
                alike.append(difference)
        if len(studied) > 1 and alike:
            mean, total = float(np.mean([d.difference for d in alike])), sum(d.examples for d in alike)
            bounds = interval(np.mean(draws, axis=0))
            found.append(Difference(MEAN, None, other, True, mean, *bounds, None, total, len(alike)))
    return found


def read_study(folder: Path) -> tuple[list[Row], list[Difference]]:
    """What `write_study` wrote."""
    rows = read_table(folder / "study.parquet", ROWS_SCHEMA).to_pylist()
    differences = read_table(folder / "differences.parquet", DIFFERENCES_SCHEMA).to_pylist()
    return [Row(**row) for row in rows], [Difference(**row) for row in differences]
