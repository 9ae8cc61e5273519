"""The report of a sweep: a table, and curves over any of its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from tailored_llama.config import RATIOS, SWEEP_FIELDS, SweepConfig, sweep_cells
from tailored_llama.evaluation import RecoveryRow, SweepRow
from tailored_llama.reports.figures import COLOURS, DASHES, LINES, Picture, intervals, new_figure, styled, xy
from tailored_llama.reports.pages import settings_of, write_page
from tailored_llama.reports.parts import accuracy_cell, number, percent, share_cell, span
from tailored_llama.reports.tables import Cell, Column, Row, Table, store_table, table_row
from tailored_llama.store import write_rows

_RECOVERY = "Accuracy ÷ the dense model's, mean over all benchmarks, including those where dense is at its floor."
_CURVES = {  # measured quantity → title, label of its axis, caption
    "perplexity": ("Perplexity", "perplexity ÷ dense", "Perplexity ÷ the dense model's on the same text."),
    "accuracy": ("Accuracy", "mean accuracy", "Mean of the benchmarks' headline metrics."),
    "recovery": ("Recovery", "mean recovery", _RECOVERY),
}

Points = list[tuple[float, float]]
Figures = dict[str, tuple[str, Picture, str]]  # measured quantity → title, picture, caption


def write_sweep(config: SweepConfig, measured: Sequence[tuple[SweepRow, Sequence[RecoveryRow]]], *, out: Path) -> None:
    """Stage: write the Parquet and JSON tables (dense models first), `sweep.html`, and `sweep.md` with PNGs."""
    rows = [row for row, _ in measured]
    by_benchmark = [row for _, benchmark_rows in measured for row in benchmark_rows]
    write_rows(out / "sweep.parquet", rows, SweepRow)
    write_rows(out / "benchmarks.parquet", by_benchmark, RecoveryRow)
    table = _table(rows)
    errors = [f"{row.label} at {percent(row.ratio)} failed: {row.error}" for row in rows if row.error]
    store_table(replace(table, notes=tuple(errors)), out)
    figures = _figures(config, [row for row in rows if not row.error])
    for name, (_, picture, _) in figures.items():
        picture.save_png(out / f"{name}.png")
    settings = settings_of(config, ["profile"] if config.tailored else ["profile", "tuning"])
    for field in (*SWEEP_FIELDS, RATIOS, *(field for table in config.grid for field in table)):
        section, _, name = field.rpartition(".")
        settings.get(section, {}).pop(name, None)  # the page shows what all cells share
    models = list(dict.fromkeys(cell.run.model.source for cell in sweep_cells(config)))
    incomplete = " (incomplete)" if any(row.error for row in rows) else ""
    context = {
        "title": f"Sweep of {', '.join(models)}{incomplete}",
        "models": models,
        "incomplete": incomplete,
        "summary": _summary(rows),
        "figures": figures,
        "table": table,
        "recovered": _recovered(rows),
        "benchmarks": len(config.benchmarks),
        "by_benchmark": _by_benchmark(measured),
        "settings": settings,
    }
    write_page("sweep.html.j2", out / "sweep.html", context)
    write_page("sweep.md.j2", out / "sweep.md", context)


def _table(rows: Sequence[SweepRow]) -> Table:
    """A row for every setting; recoveries only if any cell was scored."""
    recovered = _recovered(rows)
    columns = [
        Column("setting", left=True),
        Column("removed /\nof the body"),
        *([] if recovered else [Column("parameters", wide=True)]),
        Column("perplexity", wide=recovered),
        Column("perplexity\n÷ dense"),
        Column("mean\naccuracy"),
        *([Column("recovery"), Column("chance-\ncorrected")] if recovered else []),
    ]
    return Table(tuple(columns), tuple(_row(row, recovered) for row in rows))


def _row(row: SweepRow, recovered: bool) -> Row:
    if row.error:
        return table_row(row.label, percent(row.ratio), f"failed: {row.error}")
    several, perplexity = row.seeds > 1, number(row.perplexity, 2)
    seeds = f"seeds {span(row.recovery_least, row.recovery_most)}" if several else ""
    extremes = (f"{number(row.perplexity_least, 2)}–{number(row.perplexity_most, 2)}",) if several else ()
    cells: list[Cell | str] = [row.label, _removed(row)]
    cells += [] if recovered else [number(row.parameters, 0)]
    cells += [Cell(perplexity, extremes, perplexity), number(row.times_dense, 2)]
    cells.append(accuracy_cell(row.accuracy, row.accuracy_stderr))
    if recovered and not row.ratio and row.curve is None:
        cells += [percent(1.0, 0)] * 2
    elif recovered:
        over = f"over {row.cc_benchmarks}"
        cells.append(share_cell(row.recovery, row.recovery_low, row.recovery_high, seeds, digits=1))
        cells.append(share_cell(row.chance_corrected, row.cc_low, row.cc_high, over, digits=1))
    return table_row(*cells, bold=not row.ratio)


def _removed(row: SweepRow) -> Cell:
    """The share of all parameters that was removed, and below it that of the body."""
    if not row.ratio:
        return Cell("–")
    brief = f"{number(100 * row.removed, 1)} / {percent(row.removed_of_body)}"
    return Cell(percent(row.removed, 2), (percent(row.removed_of_body, 2),), brief)


def _by_benchmark(measured: Sequence[tuple[SweepRow, Sequence[RecoveryRow]]]) -> Table | None:
    """Every scored setting on every benchmark; None if nothing was scored."""
    scored = [(row, found) for row, found in measured if found]
    if not scored:
        return None
    first = scored[0][1]
    columns = [Column("setting", left=True), Column("removed /\nof the body")]
    rows = [table_row("floor", "–", *(number(one.floor) for one in first))]
    for row, found in scored:
        under = [tuple(filter(None, (f"± {number(one.stderr)}", one.template))) for one in found]
        cells = [Cell(number(one.accuracy), lines) for one, lines in zip(found, under, strict=True)]
        rows.append(table_row(row.label, _removed(row), *cells, bold=not row.ratio))
    return Table((*columns, *(Column(one.benchmark, under=(str(one.metric),)) for one in first)), tuple(rows))


def _recovered(rows: Sequence[SweepRow]) -> bool:
    """Whether any cell was scored, and so has a recovery to show."""
    return any(row.recovery is not None for row in rows if row.ratio)


def _figures(config: SweepConfig, rows: Sequence[SweepRow]) -> Figures:
    """A figure of every measured quantity, by its name.

    The pictures are curves; if all settings share one value of the axis, they list the settings instead.
    """
    drawn = [row for row in rows if row.curve is not None]
    if len({row.ratio if row.place is None else row.place for row in drawn if row.ratio}) == 1:
        return _beside(drawn)
    figures: Figures = {}
    dense = [row for row in rows if not row.ratio and row.curve is None]
    for name, (title, _, caption) in _CURVES.items():
        series: dict[str, Points] = {}
        for row in drawn:
            if (value := getattr(row, name)) is not None:
                place = row.removed if row.place is None else row.place
                shown = row.times_dense if name == "perplexity" else value
                series.setdefault(str(row.curve), []).append((place, shown))
        if series:
            reference = 1.0 if name != "accuracy" else dense[0].accuracy if len(dense) == 1 else None
            figures[name] = (title, _curves(series, name, config.axis, reference), caption)
    if config.axis == RATIOS and len(dense) > 1 and "accuracy" in figures:
        figures["accuracy"] = _by_size(drawn, dense)
    return figures


def _by_size(drawn: Sequence[SweepRow], dense: Sequence[SweepRow]) -> tuple[str, Picture, str]:
    """Accuracy over the size that is left, of several base models: which is the best of a given size?"""
    series: dict[str, Points] = {}
    for row in drawn:
        if row.accuracy is not None:
            base = [own for own in dense if own.parameters == row.dense_parameters and own.accuracy is not None]
            points = [(2 * (own.parameters or 0) / 1e6, own.accuracy or 0.0) for own in (row, *base)]
            series[str(row.curve)] = [*series.get(str(row.curve), []), *points]
    caption = f"{_CURVES['accuracy'][2]} The largest of each base is the dense model."
    return "Accuracy", _curves(series, "accuracy", "megabytes in 16 bits", None), caption


@styled
def _curves(series: Mapping[str, Points], name: str, axis: str, reference: float | None) -> Picture:
    """One line through the points of each setting, and the dense model's value, if there is one, as a reference."""
    figure, ylabel = new_figure(420 + 11 * len(series)), _CURVES[name][1]
    axes, by_ratio = figure.subplots(), axis == RATIOS
    for nth, (label, points) in enumerate(series.items()):
        colour, dash = COLOURS[LINES[nth % len(LINES)]], DASHES[nth // len(LINES) % len(DASHES)]
        axes.plot(*xy(sorted(points)), color=colour, linestyle=dash, linewidth=2, marker="o", label=label)
    if reference is not None:
        axes.axhline(reference, color=COLOURS["dense"], linewidth=1.5, linestyle=(0, (4, 2)), label="dense")
    if name == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif name == "recovery":
        axes.yaxis.set_major_formatter(PercentFormatter(1, None, " %"))
    if by_ratio:
        axes.xaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    axes.set_xlabel("parameters removed" if by_ratio else axis)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=2, borderpad=0)
    over = "the share of parameters removed" if by_ratio else axis
    return Picture(figure, f"{ylabel} over {over}: {', '.join(series)}")


def _beside(rows: Sequence[SweepRow]) -> Figures:
    """As `_figures`: recovery with its intervals or, if nothing was scored, perplexity over the seeds."""
    names = [row.label for row in rows]
    if not _recovered(rows):
        values = [
            _scaled(1 / (row.dense_perplexity or math.nan), row.perplexity, row.perplexity_least, row.perplexity_most)
            for row in rows
        ]
        picture = intervals(names, {"perplexity": values}, 1, "times the dense model's", "Perplexity ÷ dense")
        caption = "Perplexity ÷ the dense model's on the same text; lines span the lowest to the highest seed."
        return {"perplexity": ("Perplexity", picture, caption)}
    panels = {
        "mean recovery": [_scaled(100, row.recovery, row.recovery_low, row.recovery_high) for row in rows],
        "chance-corrected": [_scaled(100, row.chance_corrected, row.cc_low, row.cc_high) for row in rows],
    }
    known = {title: values for title, values in panels.items() if any(values)}
    picture = intervals(names, known, 100, "% of dense", "Recovery with 95 % intervals")
    caption = (
        f"{_RECOVERY} Chance-corrected: only the accuracy above the floor, over the benchmarks where dense is "
        "significantly above it. Lines are 95\N{NO-BREAK SPACE}% intervals."
    )
    return {"recovery": ("Recovery", picture, caption)}


def _scaled(factor: float, *values: float | None) -> tuple[float, float, float] | None:
    """A value and its bounds in another unit; None if there is no value."""
    value, low, high = (math.nan if one is None else factor * one for one in values)
    return None if math.isnan(value) else (value, low, high)


def _summary(rows: Sequence[SweepRow]) -> str:
    """The number of settings, and the best of each ratio."""
    cells = [row for row in rows if row.ratio]
    done = [row for row in cells if not row.error]
    failed = len(cells) - len(done)
    summary = f"{len(cells)} settings" + (f", of which {failed} failed" if failed else "")
    seeds = {row.seeds for row in done}
    if max(seeds, default=1) > 1:
        summary += f", each with {seeds.pop()} seeds" if len(seeds) == 1 else f", with up to {max(seeds)} seeds"
    if recovered := [(row, -(row.recovery or 0), percent(row.recovery)) for row in done if row.recovery is not None]:
        summary += f". Highest mean recovery: {_first(recovered)}"
    if done:
        lowest = [(row, row.times_dense, number(row.times_dense, 2)) for row in done]
        summary += f". Lowest perplexity ÷ dense: {_first(lowest)}"
    return f"{summary}."


def _first(rows: Sequence[tuple[SweepRow, float, str]]) -> str:
    """The lowest value at each ratio, as it is shown, with the labels of all rows that show the same."""
    texts = []
    for ratio in sorted({row.ratio for row, _, _ in rows}):
        at_ratio = [(value, shown, row.label) for row, value, shown in rows if row.ratio == ratio]
        best = min(at_ratio)[1]
        names = [label for _, shown, label in at_ratio if shown == best]
        whose = "all settings" if 1 < len(names) == len(at_ratio) else ", ".join(names)
        texts.append(f"{best} at {percent(ratio, 0)} ({whose})")
    return "; ".join(texts)
