"""Sweeps: one run for every cell of a grid of settings, and what was measured of each."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tailored_llama import recovery
from tailored_llama.artifacts import read_table, schema_of
from tailored_llama.checkpoints import read_structure
from tailored_llama.config import RunConfig
from tailored_llama.config_loading import assign, read_config_data, validate_as, validate_config
from tailored_llama.errors import InputError
from tailored_llama.scoring import read_metrics

RATIOS = "pruning.ratios"
SEED = "seed"
MODEL = "model"
DENSE = "dense"
TEMPLATE, SEARCHED = "prompts.template", "searched"
UNTUNED = ("distillation.weight", "distillation.sequences")  # read in tuning alone
MAY_VARY = (SEED, MODEL, "calibration", "pruning", "reconstruction", "distillation", "healing", "prompts", "tuning")


class SweepConfig(RunConfig):
    """A run configuration, and the settings that differ from cell to cell."""

    grid: tuple[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], ...] = Field(
        min_length=1,
        description='Tables of dotted field → list of values, such as "pruning.criterion" = ["flap", "random"]; '
        "each table makes one cell of every combination. Of pruning.ratios, each value is one cell; cells that differ "
        "in their seed only are one row of the table. As prompts.template, searched is for each benchmark the shipped "
        "set that the cell's untuned model does best with on the shots and held-out examples; the dense model keeps "
        "the run's own.",
    )
    labels: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="What each table of the grid is called; absent: its cells are called by what tells them apart."
    )
    scored: bool = Field(True, description="Score the benchmarks too, not only the perplexity.")
    tailored: bool = Field(False, description="Tune, and score what was tuned, beside the dense model's scores.")
    axis: str = Field(RATIOS, description="Field of the grid that the curves are drawn over, such as tuning.shots.")


@dataclass(frozen=True)
class Cell:
    """One combination: the run it stands for, and what tells it apart, seed and ratio left out.

    `curve` is the label of the curve it is a point of, and `place` where on the axis, None where that is the ratio;
    `dense` is what its dense model's row is called, and `searched` whether its template is chosen on train examples.
    """

    label: str
    curve: str
    place: float | None
    dense: str
    searched: bool
    run: RunConfig


@dataclass(frozen=True)
class Row:
    """What became of a cell, or of several that differ in their seed only: figures, or why there are none.

    A dense model has the ratio 0. `dense_parameters` and `dense_perplexity` are those of the cell's dense model.
    Perplexity is the mean over seeds, with the lowest and the highest; accuracy the mean of the headline metrics;
    recovery and chance-corrected recovery are as in `recovery.Row`, of each example's mean over the seeds:
    `_low` and `_high` bound their 95 % interval over the examples, `_least` and `_most` are those of single seeds.
    """

    label: str
    ratio: float
    curve: str | None = None
    place: float | None = None
    seeds: int = 1
    parameters: int | None = None
    dense_parameters: int | None = None
    perplexity: float | None = None
    perplexity_least: float | None = None
    perplexity_most: float | None = None
    dense_perplexity: float | None = None
    accuracy: float | None = None
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
        """Share of all parameters of the dense model that is gone."""
        return 1 - (self.parameters or 0) / (self.dense_parameters or 1)

    @property
    def times_dense(self) -> float:
        """Perplexity ÷ the dense model's."""
        return (self.perplexity or math.nan) / (self.dense_perplexity or math.nan)


@dataclass(frozen=True)
class BenchmarkRow:
    """One row of the table on one benchmark: accuracy in the headline metric, and recovery, over the row's seeds.

    `dense_above_floor`: whether the dense model is, significantly; elsewhere its recovery says little. `template`: what
    a search chose, for each seed where they differ.
    """

    label: str
    ratio: float
    benchmark: str
    metric: str
    examples: int
    floor: float
    accuracy: float
    stderr: float
    recovery: float | None
    recovery_low: float | None
    recovery_high: float | None
    dense_above_floor: bool
    template: str | None = None


OWN = set(SweepConfig.model_fields) - set(RunConfig.model_fields)
SWEEP_SCHEMA, BENCHMARKS_SCHEMA = schema_of(Row), schema_of(BenchmarkRow)


def load_sweep(path: str | Path, overrides: list[str] | None = None) -> SweepConfig:
    """Read a sweep's TOML file, as `load_config` reads a run's; every cell is checked.

    Raises:
        InputError: as `load_config`; or a cell is not a valid run.
    """
    config = validate_as(SweepConfig, read_config_data(path, overrides))
    cells(config)
    return config


def cells(config: SweepConfig) -> list[Cell]:
    """Every distinct combination of the grid, in its order.

    Raises:
        InputError: a field that is not one or must not differ, or a value out of bounds; the cell is named.
    """
    shared = config.model_dump(mode="json", exclude=OWN)
    fields = list(dict.fromkeys(field for table in config.grid for field in table))
    for field in fields:
        if field.split(".")[0] not in MAY_VARY:
            raise InputError(f"grid: got {field!r}; allowed: seed, and the fields of {', '.join(MAY_VARY[1:])}")
        if not config.tailored and (field.startswith("tuning.") or field in UNTUNED):
            raise InputError(
                f"grid: got {field!r}, which changes nothing without tuning; allowed: with tailored = true"
            )
    if config.axis not in (RATIOS, *fields):
        raise InputError(f"axis: got {config.axis!r}; allowed: {RATIOS}, or a field of the grid")
    if config.labels and len(config.labels) != len(config.grid):
        raise InputError(
            f"labels: got {len(config.labels)}; allowed: {len(config.grid)}, one for each table of the grid"
        )
    varying = [field for field in fields if field not in (RATIOS, SEED)]
    found: dict[str, Cell] = {}
    for table, name in zip(config.grid, config.labels or [""] * len(config.grid), strict=True):
        shown = [field for field in table if len(table[field]) > 1 and field in varying] if name else varying
        for values in itertools.product(*table.values()):
            settings = dict(zip(table, values, strict=True))
            data = json.loads(json.dumps(shared))
            try:
                for field, value in settings.items():
                    if (field, value) != (TEMPLATE, SEARCHED):
                        assign(data, field, [value] if field == RATIOS else value)
                run = validate_config(data)
            except InputError as error:
                raise InputError(f"grid, cell {settings}: {error}") from None
            for ratio in run.pruning.ratios:
                one = run.model_copy(update={"pruning": run.pruning.model_copy(update={"ratios": (ratio,)})})
                searched = settings.get(TEMPLATE) == SEARCHED
                found.setdefault(f"{one.model_dump_json()} {searched}", _cell(config, name, shown, one, searched))
    return list(found.values())


def dense_runs(config: SweepConfig, every: Sequence[Cell]) -> dict[str, RunConfig]:
    """The sweep's own settings for each dense model, by what its row is called."""
    return {cell.dense: config.model_copy(update={MODEL: cell.run.model}) for cell in every}


def _cell(config: SweepConfig, name: str, varying: Sequence[str], run: RunConfig, searched: bool) -> Cell:
    models = dict.fromkeys(field for table in config.grid for field in table if field.split(".")[0] == MODEL)
    dense = ", ".join([DENSE, *(_shown(run, field) for field in models)])
    names = [name] if name else []

    def shown(field: str) -> str:
        return SEARCHED if searched and field == TEMPLATE else _shown(run, field)

    label = ", ".join([*names, *map(shown, varying)]) or "pruned"
    if config.axis == RATIOS:
        return Cell(label, label, None, dense, searched, run)
    place = _value(run, config.axis)
    if isinstance(place, bool) or not isinstance(place, int | float):
        raise InputError(f"axis: got {config.axis!r}, of which a cell has {place!r}; allowed: a field of numbers")
    others = names + [shown(field) for field in varying if field != config.axis]
    return Cell(label, ", ".join([*others, f"@ {run.pruning.ratios[0]:g}"]), place, dense, searched, run)


def _value(run: RunConfig, field: str) -> Any:
    return functools.reduce(getattr, field.split("."), run)


def _shown(run: RunConfig, field: str) -> str:
    """A field's value in a run; with its name, where the value alone would not say what it is of."""
    value = _value(run, field)
    return value if isinstance(value, str) and value != "none" else f"{field.split('.')[-1]}={value}"


@dataclass(frozen=True)
class Made:
    """A model, dense or of a cell, and what was measured of it: folders, those of `scores` by benchmark.

    `templates` are the template sets that were searched for, by benchmark.
    """

    checkpoint: Path
    perplexity: Path
    scores: Mapping[str, Path]
    templates: Mapping[str, str] | None = None


def measure(row: Row, made: Sequence[Made], dense: Sequence[Made]) -> tuple[Row, list[BenchmarkRow]]:
    """A row with the figures of its cells, which differ in their seed only, each beside its dense model."""
    perplexities = [read_metrics(cell.perplexity)["perplexity"] for cell in made]
    row = replace(
        row,
        seeds=len(made),
        parameters=read_structure(made[0].checkpoint).parameters,
        dense_parameters=read_structure(dense[0].checkpoint).parameters,
        perplexity=math.fsum(perplexities) / len(made),
        perplexity_least=min(perplexities),
        perplexity_most=max(perplexities),
        dense_perplexity=read_metrics(dense[0].perplexity)["perplexity"],
    )
    if not made[0].scores:
        return row, []
    found = _recovery(made, dense)
    singles = [_recovery([cell], [beside])[-1].recovery for cell, beside in zip(made, dense, strict=True)]
    known = [value for value in singles if value is not None]
    whole = found[-1]
    row = replace(
        row,
        accuracy=whole.tailored,
        accuracy_stderr=whole.tailored_stderr,
        examples=whole.examples,
        recovery=whole.recovery,
        recovery_low=whole.recovery_low,
        recovery_high=whole.recovery_high,
        recovery_least=min(known, default=None),
        recovery_most=max(known, default=None),
        chance_corrected=whole.chance_corrected,
        cc_low=whole.cc_low,
        cc_high=whole.cc_high,
        cc_benchmarks=whole.cc_benchmarks,
    )
    return row, [_on_benchmark(row, one, made) for one in found if one.benchmark != recovery.MEAN]


def _on_benchmark(row: Row, found: recovery.Row, made: Sequence[Made]) -> BenchmarkRow:
    chosen = dict.fromkeys(cell.templates[found.benchmark] for cell in made if cell.templates)
    return BenchmarkRow(
        row.label,
        row.ratio,
        found.benchmark,
        metric=str(found.metric),
        examples=found.examples,
        floor=found.floor,
        accuracy=found.tailored or 0.0,
        stderr=found.tailored_stderr or 0.0,
        recovery=found.recovery,
        recovery_low=found.recovery_low,
        recovery_high=found.recovery_high,
        dense_above_floor=bool(found.dense_above_floor),
        template=", ".join(chosen) or None,
    )


def _recovery(made: Sequence[Made], dense: Sequence[Made]) -> list[recovery.Row]:
    """Of cells that differ in their seed only: on each benchmark, and where there are several their mean, last."""
    tailored, whole = (
        recovery.ModelScores(scores={name: [one.scores[name] for one in models] for name in models[0].scores})
        for models in (made, dense)
    )
    run = recovery.PrunedRun(None, tailored=tailored)
    return recovery.recovery_rows(recovery.ReportInputs(None, "", whole, (run,)))


def read_sweep(folder: Path) -> list[Row]:
    """The rows of `sweep.parquet`, dense models first."""
    return [Row(**row) for row in read_table(folder / "sweep.parquet", SWEEP_SCHEMA).to_pylist()]
