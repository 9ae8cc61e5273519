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
from tailored_llama.comparison_plots import curves
from tailored_llama.pictures import COLOURS
from tailored_llama.report_parts import number, page_template, percent, settings_of, span
from tailored_llama.report_plots import markdown_picture
from tailored_llama.sweeps import OWN, RATIOS, SWEEP_SCHEMA, Row, SweepConfig


def write_sweep(config: SweepConfig, dense: Row, rows: Sequence[Row], out: Path) -> None:
    """Stage: write `sweep.parquet` (the dense model first), `sweep.html`, and `sweep.md` with PNG files."""
    columns = {name: [getattr(row, name) for row in (dense, *rows)] for name in SWEEP_SCHEMA.names}
    write_table(out / "sweep.parquet", columns, SWEEP_SCHEMA)
    figures = _figures(config, dense, [row for row in rows if not row.error])
    (out / "sweep.html").write_text(_page(config, dense, rows, figures), encoding="utf-8")
    (out / "sweep.md").write_text(_markdown(config, dense, rows, figures), encoding="utf-8")
    for name, figure in figures.items():
        figure["picture"].save_png(out / f"{name}.png")


def console_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal: the dense model, then every cell."""
    dense, table = rows[0], Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    recovered = any(row.recovery is not None for row in rows[1:])
    table.add_column("setting", overflow="fold")
    for name in ("removed", "perplexity", "÷ dense", "mean accuracy", *(("recovery",) if recovered else ())):
        table.add_column(name, justify="right")
    for row in rows:
        if row.error:
            table.add_row(escape(row.label), percent(row.ratio), escape(f"failed: {row.error}"))
            continue
        accuracy = "–" if row.accuracy is None else f"{number(row.accuracy)}±{number(row.accuracy_stderr).lstrip('0')}"
        removed = percent(_removed(row, dense), 2)
        figures = [removed, number(row.perplexity, 2), number(_times_dense(row, dense), 2), accuracy]
        if recovered:
            figures.append(f"{percent(row.recovery)} ({span(row.recovery_low, row.recovery_high)})")
        table.add_row(escape(row.label), *figures)
    return table


def _removed(row: Row, dense: Row) -> float:
    """Share of all parameters that is gone."""
    return 1 - (row.parameters or 0) / (dense.parameters or 1)


def _times_dense(row: Row, dense: Row) -> float:
    return (row.perplexity or math.nan) / (dense.perplexity or math.nan)


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
    reference: float | None  # the dense model's value
    caption: str
    log: bool = False
    shares: bool = False


def _figures(config: SweepConfig, dense: Row, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Title, picture and caption of every quantity that was measured, by its name."""
    found = {}
    for figure in (
        _Figure(
            "Perplexity",
            "perplexity",
            "perplexity ÷ dense",
            1.0,
            "Perplexity ÷ the dense model's, of the same text.",
            True,
        ),
        _Figure("Accuracy", "accuracy", "mean accuracy", dense.accuracy, "Mean of the benchmarks' headline metrics."),
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
                shown = _times_dense(row, dense) if figure.field == "perplexity" else value
                place = _removed(row, dense) if row.place is None else row.place
                series.setdefault(row.curve, []).append((place, shown))
        if series and figure.reference is not None:
            axis = None if config.axis == RATIOS else config.axis
            picture = curves(series, figure.axis, figure.reference, figure.log, axis, figure.shares)
            found[figure.field] = {"title": figure.title, "picture": picture, "caption": figure.caption}
    return found


def _summary(dense: Row, rows: Sequence[Row]) -> str:
    """How many settings, and the best of each ratio."""
    done = [row for row in rows if not row.error]
    failed = len(rows) - len(done)
    summary = f"{len(rows)} settings" + (f", of which {failed} failed" if failed else "")
    if seeds := max((row.seeds for row in done if row.seeds > 1), default=0):
        summary += f", each with {seeds} seeds"
    if recovered := [row for row in done if row.recovery is not None]:
        best = {row.ratio: row for row in sorted(recovered, key=lambda row: row.recovery or 0)}  # the last one stays
        found = [f"{percent(best[r].recovery)} at {percent(r, 0)} ({best[r].label})" for r in sorted(best)]
        summary += f". Highest mean recovery: {'; '.join(found)}"
    best = {row.ratio: row for row in sorted(done, key=lambda row: -(row.perplexity or math.inf))}
    lowest = [f"{number(best[r].perplexity, 2)} at {percent(r, 0)} ({best[r].label})" for r in sorted(best)]
    summary += f". Lowest perplexity: {'; '.join(lowest)}" if lowest else ""
    return f"{summary}; dense: {number(dense.perplexity, 2)}."


def _title(config: SweepConfig) -> str:
    return f"Sweep of {config.model.source}"


def _page(config: SweepConfig, dense: Row, rows: Sequence[Row], figures: Mapping[str, Mapping[str, Any]]) -> str:
    return page_template("sweep.html.j2").render(
        title=_title(config),
        summary=_summary(dense, rows),
        figures=list(figures.values()),
        dense=dense,
        rows=rows,
        recovered=any(row.recovery is not None for row in rows),
        benchmarks=len(config.benchmarks),
        settings=_shared(config),
        colours=COLOURS,
    )


def _markdown(config: SweepConfig, dense: Row, rows: Sequence[Row], figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Summary, table and curves, for the run's page in Prefect."""
    model = config.model.source.replace("`", "'")  # in a code span nothing is markup, and the name cannot end it
    lines = [f"# {_title(config).replace(config.model.source, f'`{model}`')}", "", _plain(_summary(dense, rows)), ""]
    recovered = any(row.recovery is not None for row in rows)
    names = ["setting", "removed", "perplexity", "÷ dense", "mean accuracy", *(["recovery"] if recovered else [])]
    lines += [f"| {' | '.join(names)} |", f"|:--|{'--:|' * (len(names) - 1)}"]
    for row in (dense, *rows):
        if row.error:
            cells = [percent(row.ratio), f"failed: {_plain(row.error)}"]
        else:
            accuracy = "–" if row.accuracy is None else f"{number(row.accuracy)} ± {number(row.accuracy_stderr)}"
            cells = [percent(_removed(row, dense), 2), number(row.perplexity, 2), number(_times_dense(row, dense), 2)]
            cells += [accuracy.replace("± ", "±\N{NO-BREAK SPACE}")]
            cells += [f"{percent(row.recovery)} ({span(row.recovery_low, row.recovery_high)})".removesuffix(" ()")]
        cells += [""] * len(names)
        lines.append(f"| {' | '.join([_plain(row.label), *cells][: len(names)])} |")
    for name, figure in figures.items():
        lines += ["", f"## {figure['title']}", "", figure["caption"], "", markdown_picture(name, figure["picture"])]
    return "\n".join([*lines, ""])


def _plain(text: str) -> str:
    """No markup, and no end of a table's cell."""
    return str(Markup.escape(text)).replace("|", "&#124;")
