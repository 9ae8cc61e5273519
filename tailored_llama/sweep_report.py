"""The report of a sweep: a table, and curves over any of its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.markup import escape
from rich.table import Table

from tailored_llama.artifacts import write_table
from tailored_llama.comparison_plots import curves, intervals
from tailored_llama.pictures import COLOURS
from tailored_llama.report_parts import number, page_template, percent, settings_of, share
from tailored_llama.report_plots import markdown_picture
from tailored_llama.sweeps import (
    BENCHMARKS_SCHEMA,
    OWN,
    RATIOS,
    SWEEP_SCHEMA,
    BenchmarkRow,
    Row,
    SweepConfig,
    cells,
)

INTERVALS = ("recovery", "chance-corrected")  # columns


def write_sweep(config: SweepConfig, measured: Sequence[tuple[Row, Sequence[BenchmarkRow]]], out: Path) -> None:
    """Stage: write `sweep.parquet` (dense models first), `benchmarks.parquet`, `sweep.html`, and `sweep.md` with PNGs.

    Args:
        config: the sweep's.
        measured: every row, and the same on each benchmark.
        out: an existing folder.
    """
    rows = [row for row, _ in measured]
    single = [one for _, found in measured for one in found]
    for name, schema, table in (("sweep", SWEEP_SCHEMA, rows), ("benchmarks", BENCHMARKS_SCHEMA, single)):
        columns = {column: [getattr(row, column) for row in table] for column in schema.names}
        write_table(out / f"{name}.parquet", columns, schema)
    figures = _figures(config, [row for row in rows if not row.error])
    (out / "sweep.html").write_text(_page(config, measured, figures), encoding="utf-8")
    (out / "sweep.md").write_text(_markdown(config, rows, figures), encoding="utf-8")
    for name, figure in figures.items():
        figure["picture"].save_png(out / f"{name}.png")


def console_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal: dense models, then every cell."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("setting", overflow="fold")
    for name in _columns(rows):
        table.add_column(name.replace("-", "-\n"), justify="right", no_wrap=name in INTERVALS)
    for row in rows:
        table.add_row(escape(row.label), *map(escape, _shown(row, rows)))
    return table


def _columns(rows: Sequence[Row]) -> list[str]:
    """What a table says of each setting, where there is no room for all."""
    if _recovered(rows):
        return ["removed", "perplexity ÷ dense", "mean accuracy", *INTERVALS]
    return ["removed", "perplexity", "perplexity ÷ dense", "mean accuracy"]


def _shown(row: Row, rows: Sequence[Row]) -> list[str]:
    """The same of one row, or why it has no figures."""
    if row.error:
        return [percent(row.ratio), f"failed: {row.error}"]
    accuracy = "–" if row.accuracy is None else f"{number(row.accuracy)}±{number(row.accuracy_stderr).lstrip('0')}"
    if not _recovered(rows):
        return [percent(row.removed, 2), number(row.perplexity, 2), number(row.times_dense, 2), accuracy]
    recovered = share(row.recovery, row.recovery_low, row.recovery_high)
    corrected = share(row.chance_corrected, row.cc_low, row.cc_high)
    return [percent(row.removed, 2), number(row.times_dense, 2), accuracy, recovered, corrected]


def _recovered(rows: Sequence[Row]) -> bool:
    """Whether any cell was scored, and so has a recovery to be shown."""
    return any(row.recovery is not None for row in rows if row.ratio)


def _shared(config: SweepConfig) -> dict[str, dict[str, str]]:
    """The settings that no cell changes, as `settings_of`; those that a sweep does not read are left out."""
    unread = {"profile"} | (set() if config.tailored else {"tuning"})
    sections = {name: fields for name, fields in settings_of(config).items() if name not in unread}
    for field in (*OWN, RATIOS, *(field for table in config.grid for field in table)):
        section, _, name = field.rpartition(".")
        sections.get(section, {}).pop(name, None)
    return sections


@dataclass(frozen=True)
class _Figure:
    title: str
    field: str
    axis: str
    reference: float | None  # the dense model's value; None: there are several
    caption: str
    log: bool = False
    shares: bool = False


def _figures(config: SweepConfig, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Title, picture and caption of every quantity that was measured, by its name.

    Curves, or where all settings stand at one place of the axis, a picture of the settings below one another.
    """
    drawn = [row for row in rows if row.curve is not None]
    if len({row.ratio if row.place is None else row.place for row in drawn}) == 1:
        return _beside(drawn)
    found = {}
    dense = [row.accuracy for row in rows if not row.ratio]
    for figure in (
        _Figure(
            "Perplexity",
            "perplexity",
            "perplexity ÷ dense",
            1.0,
            "Perplexity ÷ the dense model's, of the same text.",
            True,
        ),
        _Figure(
            "Accuracy",
            "accuracy",
            "mean accuracy",
            dense[0] if len(dense) == 1 else None,
            "Mean of the benchmarks' headline metrics.",
        ),
        _Figure(
            "Recovery",
            "recovery",
            "mean recovery",
            1.0,
            "Accuracy ÷ the dense model's, mean over all benchmarks, those that dense itself cannot do too.",
            shares=True,
        ),
    ):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            value = getattr(row, figure.field)
            if value is not None and row.curve is not None:
                shown = row.times_dense if figure.field == "perplexity" else value
                place = row.removed if row.place is None else row.place
                series.setdefault(row.curve, []).append((place, shown))
        if series:
            axis = None if config.axis == RATIOS else config.axis
            picture = curves(series, figure.axis, figure.reference, figure.log, axis, figure.shares)
            found[figure.field] = {"title": figure.title, "picture": picture, "caption": figure.caption}
    return found


def _beside(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """As `_figures`: recovery with its intervals; where nothing was scored, perplexity over the seeds."""
    names = [row.label for row in rows]
    if not _recovered(rows):
        values = [
            _scaled(1 / (row.dense_perplexity or math.nan), row.perplexity, row.perplexity_least, row.perplexity_most)
            for row in rows
        ]
        picture = intervals(names, {"perplexity": values}, 1, "times the dense model's", "Perplexity ÷ dense")
        caption = "Perplexity ÷ the dense model's, of the same text; a line is from the lowest to the highest seed."
        return {"perplexity": {"title": "Perplexity", "picture": picture, "caption": caption}}
    panels = {
        "mean recovery": [_scaled(100, row.recovery, row.recovery_low, row.recovery_high) for row in rows],
        "chance-corrected": [_scaled(100, row.chance_corrected, row.cc_low, row.cc_high) for row in rows],
    }
    known = {title: values for title, values in panels.items() if any(values)}
    picture = intervals(names, known, 100, "% of dense", "Recovery with 95 % intervals")
    caption = (
        "Accuracy ÷ the dense model's, mean over all benchmarks, those that dense itself cannot do too; "
        "chance-corrected: of what is above the floor, over the benchmarks that dense can do. The lines are "
        "95\N{NO-BREAK SPACE}% intervals."
    )
    return {"recovery": {"title": "Recovery", "picture": picture, "caption": caption}}


def _scaled(factor: float, *values: float | None) -> tuple[float, float, float] | None:
    """A value and its ends in another unit; None where there is no value."""
    value, low, high = (math.nan if one is None else factor * one for one in values)
    return None if math.isnan(value) else (value, low, high)


def _summary(rows: Sequence[Row]) -> str:
    """How many settings, and the best of each ratio."""
    cells = [row for row in rows if row.ratio]
    done = [row for row in cells if not row.error]
    failed = len(cells) - len(done)
    summary = f"{len(cells)} settings" + (f", of which {failed} failed" if failed else "")
    if seeds := max((row.seeds for row in done if row.seeds > 1), default=0):
        summary += f", each with {seeds} seeds"
    if recovered := [(row, -(row.recovery or 0), percent(row.recovery)) for row in done if row.recovery is not None]:
        summary += f". Highest mean recovery: {_first(recovered)}"
    if done:
        lowest = [(row, row.times_dense, number(row.times_dense, 2)) for row in done]
        summary += f". Lowest perplexity ÷ dense: {_first(lowest)}"
    return f"{summary}."


def _first(rows: Sequence[tuple[Row, float, str]]) -> str:
    """Of each ratio the row with the least value, as what it is shown, and all that show the same."""
    said = []
    for ratio in sorted({row.ratio for row, _, _ in rows}):
        here = [(value, shown, row.label) for row, value, shown in rows if row.ratio == ratio]
        best = min(here)[1]
        names = [label for _, shown, label in here if shown == best]
        whose = "all settings" if 1 < len(names) == len(here) else ", ".join(names)
        said.append(f"{best} at {percent(ratio, 0)} ({whose})")
    return "; ".join(said)


def _models(config: SweepConfig) -> list[str]:
    """The sources of the models that are pruned."""
    return list(dict.fromkeys(cell.run.model.source for cell in cells(config)))


def _page(
    config: SweepConfig,
    measured: Sequence[tuple[Row, Sequence[BenchmarkRow]]],
    figures: Mapping[str, Mapping[str, Any]],
) -> str:
    rows = [row for row, _ in measured]
    return page_template("sweep.html.j2").render(
        title=f"Sweep of {', '.join(_models(config))}",
        summary=_summary(rows),
        figures=list(figures.values()),
        rows=rows,
        recovered=_recovered(rows),
        benchmarks=len(config.benchmarks),
        measured=[(row, found) for row, found in measured if found],
        settings=_shared(config),
        colours=COLOURS,
    )


def _markdown(config: SweepConfig, rows: Sequence[Row], figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Summary, table and curves, for the run's page in Prefect."""
    models = [model.replace("`", "'") for model in _models(config)]  # so that no name can end its code span
    lines = [f"# Sweep of {', '.join(f'`{model}`' for model in models)}", "", _plain(_summary(rows)), ""]
    names = _columns(rows)
    lines += [f"| setting | {' | '.join(names)} |", f"|:--|{'--:|' * len(names)}"]
    for row in rows:
        values = [*_shown(row, rows), *[""] * len(names)][: len(names)]
        lines.append(f"| {' | '.join(map(_plain, [row.label, *values]))} |")
    for name, figure in figures.items():
        lines += ["", f"## {figure['title']}", "", figure["caption"], "", markdown_picture(name, figure["picture"])]
    return "\n".join([*lines, ""])


def _plain(text: str) -> str:
    """No markup, and no end of a table's cell."""
    return str(Markup.escape(text)).replace("|", "&#124;")
