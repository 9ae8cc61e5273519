"""Sweeps: one run for every cell of a grid of settings, as a table and curves."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from markupsafe import Markup
from pydantic import Field
from rich import box
from rich.markup import escape
from rich.table import Table

from tailored_llama import plots
from tailored_llama.artifacts import read_table, schema_of, write_table
from tailored_llama.checkpoints import read_structure
from tailored_llama.config import RunConfig, assign, read_config_data, validate_as, validate_config
from tailored_llama.errors import InputError
from tailored_llama.reports import number, page_template, percent, settings_of
from tailored_llama.scoring import read_metrics

RATIOS = "pruning.ratios"
MAY_VARY = ("seed", "calibration", "pruning", "reconstruction")  # cells share all else with the dense model


class SweepConfig(RunConfig):
    """A run configuration, and the settings that differ from cell to cell."""

    grid: tuple[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], ...] = Field(
        min_length=1,
        description='Tables of dotted field → list of values, such as "pruning.criterion" = ["flap", "random"]; '
        "each table makes one cell of every combination. Of pruning.ratios, each value is one cell.",
    )
    scored: bool = Field(True, description="Score the benchmarks too, not only the perplexity.")


@dataclass(frozen=True)
class Cell:
    """One combination: the run it stands for, and what tells it apart (the ratio left out)."""

    label: str
    run: RunConfig


@dataclass(frozen=True)
class Row:
    """What became of a cell: figures, or why there are none. Accuracy is the mean of the headline metrics."""

    label: str
    ratio: float
    parameters: int | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    examples: int | None = None
    error: str | None = None


SWEEP_SCHEMA = schema_of(Row)


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
    shared = config.model_dump(mode="json", exclude={"grid", "scored"})
    varying = [field for table in config.grid for field in table if field != RATIOS]
    for field in {field: None for table in config.grid for field in table}:
        if field.split(".")[0] not in MAY_VARY:
            raise InputError(f"grid: got {field!r}; allowed: seed, and the fields of {', '.join(MAY_VARY[1:])}")
    found: dict[str, Cell] = {}
    for table in config.grid:
        for values in itertools.product(*table.values()):
            settings = dict(zip(table, values, strict=True))
            data = json.loads(json.dumps(shared))
            try:
                for field, value in settings.items():
                    assign(data, field, [value] if field == RATIOS else value)
                run = validate_config(data)
            except InputError as error:
                raise InputError(f"grid, cell {settings}: {error}") from None
            label = ", ".join(_shown(run, field) for field in dict.fromkeys(varying))
            for ratio in run.pruning.ratios:
                one = run.model_copy(update={"pruning": run.pruning.model_copy(update={"ratios": (ratio,)})})
                found.setdefault(one.model_dump_json(), Cell(label or "pruned", one))
    return list(found.values())


def _shown(run: RunConfig, field: str) -> str:
    """A field's value in a run; with its name, where the value alone would not say what it is of."""
    value = functools.reduce(getattr, field.split("."), run)
    return value if isinstance(value, str) else f"{field.split('.')[-1]}={value}"


def measure(label: str, ratio: float, checkpoint: Path, perplexity: Path, scores: Sequence[Path]) -> Row:
    """The row of a checkpoint from its perplexity and its scores of every benchmark."""
    metrics = [read_metrics(folder) for folder in scores]
    values = [found[found["metric"]] for found in metrics]
    errors = [found[f"{found['metric']}_stderr"] for found in metrics]
    return Row(
        label,
        ratio,
        parameters=read_structure(checkpoint).parameters,
        perplexity=read_metrics(perplexity)["perplexity"],
        accuracy=math.fsum(values) / len(values) if values else None,
        accuracy_stderr=math.hypot(*errors) / len(values) if values else None,  # of other examples: independent
        examples=sum(found["examples"] for found in metrics) if values else None,
    )


def write_sweep(config: SweepConfig, dense: Row, rows: Sequence[Row], out: Path) -> None:
    """Stage: write `sweep.parquet` (the dense model first) and `sweep.html`."""
    columns = {name: [getattr(row, name) for row in (dense, *rows)] for name in SWEEP_SCHEMA.names}
    write_table(out / "sweep.parquet", columns, SWEEP_SCHEMA)
    (out / "sweep.html").write_text(_page(config, dense, rows), encoding="utf-8")


def read_sweep(folder: Path) -> list[Row]:
    """The rows of `sweep.parquet`, the dense model first."""
    return [Row(**row) for row in read_table(folder / "sweep.parquet", SWEEP_SCHEMA).to_pylist()]


def console_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal: the dense model, then every cell."""
    dense, table = rows[0], Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("setting", overflow="fold")
    for name in ("removed", "perplexity", "÷ dense", "mean accuracy"):
        table.add_column(name, justify="right")
    for row in rows:
        if row.error:
            table.add_row(escape(row.label), percent(row.ratio), escape(f"failed: {row.error}"))
            continue
        accuracy = "–" if row.accuracy is None else f"{number(row.accuracy)}±{number(row.accuracy_stderr).lstrip('0')}"
        removed = percent(_removed(row, dense), 2)
        cells_ = (removed, number(row.perplexity, 2), number(_times_dense(row, dense), 2), accuracy)
        table.add_row(escape(row.label), *cells_)
    return table


def _removed(row: Row, dense: Row) -> float:
    """Share of all parameters that is gone."""
    return 1 - (row.parameters or 0) / (dense.parameters or 1)


def _times_dense(row: Row, dense: Row) -> float:
    return (row.perplexity or math.nan) / (dense.perplexity or math.nan)


def _shared(config: SweepConfig) -> dict[str, dict[str, str]]:
    """The settings that no cell changes, as `settings_of`; those that a sweep does not read are left out."""
    sections = {name: fields for name, fields in settings_of(config).items() if name not in ("tuning", "profile")}
    for field in ("grid", "scored", RATIOS, *(field for table in config.grid for field in table)):
        section, _, name = field.rpartition(".")
        sections.get(section, {}).pop(name, None)
    return sections


def _page(config: SweepConfig, dense: Row, rows: Sequence[Row]) -> str:
    done = [row for row in rows if not row.error]
    figures = []
    for title, field, reference, log, caption in (
        ("Perplexity", "perplexity", 1.0, True, "Perplexity ÷ the dense model's, of the same text."),
        ("Accuracy", "accuracy", dense.accuracy, False, "Mean of the benchmarks' headline metrics."),
    ):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in done:
            value = getattr(row, field)
            if value is not None:
                shown = _times_dense(row, dense) if field == "perplexity" else value
                series.setdefault(row.label, []).append((_removed(row, dense), shown))
        if series and reference is not None:
            label = "perplexity ÷ dense" if field == "perplexity" else "mean accuracy"
            svg = Markup(plots.curves(series, label, reference, log))
            figures.append({"title": title, "svg": svg, "caption": caption})
    failed = len(rows) - len(done)
    summary = f"{len(rows)} cells" + (f", of which {failed} failed" if failed else "")
    best = {row.ratio: row for row in sorted(done, key=lambda row: -(row.perplexity or math.inf))}  # the last one stays
    lowest = [f"{number(best[r].perplexity, 2)} at {percent(r, 0)} ({best[r].label})" for r in sorted(best)]
    summary += f". Lowest perplexity: {'; '.join(lowest)}" if lowest else ""
    return page_template("sweep.html.j2").render(
        title=f"Sweep of {config.model.source}",
        summary=f"{summary}; dense: {number(dense.perplexity, 2)}.",
        figures=figures,
        dense=dense,
        rows=rows,
        settings=_shared(config),
        colours=plots.COLOURS,
    )
