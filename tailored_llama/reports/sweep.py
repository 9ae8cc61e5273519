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

from tailored_llama.config import RATIOS, SWEEP_FIELDS, SweepConfig, sweep_cells
from tailored_llama.evaluation import SweepBenchmarkRow, SweepRow, read_sweep
from tailored_llama.reports.comparison_plots import curves, intervals
from tailored_llama.reports.parts import markdown_picture, number, page_template, percent, settings_of, share
from tailored_llama.store import write_rows

REMOVED, ACCURACY, INTERVALS = "removed / of the body", "mean accuracy", ("recovery", "chance-corrected")  # columns


STAGE, VERSION = "sweep", 7


def write_sweep(
    config: SweepConfig, measured: Sequence[tuple[SweepRow, Sequence[SweepBenchmarkRow]]], *, out: Path
) -> None:
    """Stage: write `sweep.parquet` (dense models first), `benchmarks.parquet`, `sweep.html`, and `sweep.md` with PNGs.

    Args:
        config: the sweep's configuration.
        measured: every row, with its rows on each benchmark.
        out: an existing folder.
    """
    rows = [row for row, _ in measured]
    by_benchmark = [row for _, benchmark_rows in measured for row in benchmark_rows]
    write_rows(out / "sweep.parquet", rows, SweepRow)
    write_rows(out / "benchmarks.parquet", by_benchmark, SweepBenchmarkRow)
    figures = _figures(config, [row for row in rows if not row.error])
    (out / "sweep.html").write_text(_page(config, measured, figures), encoding="utf-8")
    (out / "sweep.md").write_text(_markdown(config, rows, figures), encoding="utf-8")
    for name, figure in figures.items():
        figure["picture"].save_png(out / f"{name}.png")


def sweep_table(folder: Path) -> Table:
    """The terminal table of a sweep's folder: dense models, then every cell."""
    rows = read_sweep(folder)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("setting", overflow="fold")
    for name in _columns(rows):
        heading = name.replace("-", "-\n").replace(" / ", " /\n").replace("mean ", "mean\n")
        table.add_column(heading, justify="right", no_wrap=name in (REMOVED, ACCURACY, *INTERVALS))
    for row in rows:
        table.add_row(escape(row.label), *map(escape, _shown(row, rows)))
    return table


def _columns(rows: Sequence[SweepRow]) -> list[str]:
    """The columns of a table that has no room for all figures."""
    if _recovered(rows):
        return [REMOVED, "perplexity ÷ dense", ACCURACY, *INTERVALS]
    return [REMOVED, "perplexity", "perplexity ÷ dense", ACCURACY]


def _shown(row: SweepRow, rows: Sequence[SweepRow]) -> list[str]:
    """The cells of one row in these columns, or why it has no figures."""
    if row.error:
        return [percent(row.ratio), f"failed: {row.error}"]
    accuracy = "–" if row.accuracy is None else f"{number(row.accuracy)}±{number(row.accuracy_stderr).lstrip('0')}"
    removed = f"{number(100 * row.removed, 1)} / {percent(row.removed_of_body)}"
    if not _recovered(rows):
        return [removed, number(row.perplexity, 2), number(row.times_dense, 2), accuracy]
    recovered = share(row.recovery, row.recovery_low, row.recovery_high)
    corrected = share(row.chance_corrected, row.cc_low, row.cc_high)
    return [removed, number(row.times_dense, 2), accuracy, recovered, corrected]


def _recovered(rows: Sequence[SweepRow]) -> bool:
    """Whether any cell was scored, and so has a recovery to show."""
    return any(row.recovery is not None for row in rows if row.ratio)


def _shared(config: SweepConfig) -> dict[str, dict[str, str]]:
    """The settings that no cell changes, as `settings_of` gives them, without those that a sweep does not read."""
    unread = {"profile"} | (set() if config.tailored else {"tuning"})
    sections = {name: fields for name, fields in settings_of(config).items() if name not in unread}
    for field in (*SWEEP_FIELDS, RATIOS, *(field for table in config.grid for field in table)):
        section, _, name = field.rpartition(".")
        sections.get(section, {}).pop(name, None)
    return sections


@dataclass(frozen=True)
class _Figure:
    title: str
    field: str
    axis: str
    reference: float | None  # the dense model's value; None if there are several dense models
    caption: str
    log: bool = False
    shares: bool = False


def _figures(config: SweepConfig, rows: Sequence[SweepRow]) -> dict[str, dict[str, Any]]:
    """Title, picture and caption of every measured quantity, by its name.

    The pictures are curves; if all settings share one value of the axis, they list the settings instead.
    """
    on_curves = [row for row in rows if row.curve is not None]
    if len({row.ratio if row.place is None else row.place for row in on_curves if row.ratio}) == 1:
        return _beside(on_curves)
    figures = {}
    dense = [row.accuracy for row in rows if not row.ratio and row.curve is None]
    for figure in (
        _Figure(
            "Perplexity",
            "perplexity",
            "perplexity ÷ dense",
            1.0,
            "Perplexity ÷ the dense model's on the same text.",
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
            "Accuracy ÷ the dense model's, mean over all benchmarks, including those where dense is at its floor.",
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
            figures[figure.field] = {"title": figure.title, "picture": picture, "caption": figure.caption}
    return figures


def _beside(rows: Sequence[SweepRow]) -> dict[str, dict[str, Any]]:
    """As `_figures`: recovery with its intervals or, if nothing was scored, perplexity over the seeds."""
    names = [row.label for row in rows]
    if not _recovered(rows):
        values = [
            _scaled(1 / (row.dense_perplexity or math.nan), row.perplexity, row.perplexity_least, row.perplexity_most)
            for row in rows
        ]
        picture = intervals(names, {"perplexity": values}, 1, "times the dense model's", "Perplexity ÷ dense")
        caption = "Perplexity ÷ the dense model's on the same text; lines span the lowest to the highest seed."
        return {"perplexity": {"title": "Perplexity", "picture": picture, "caption": caption}}
    panels = {
        "mean recovery": [_scaled(100, row.recovery, row.recovery_low, row.recovery_high) for row in rows],
        "chance-corrected": [_scaled(100, row.chance_corrected, row.cc_low, row.cc_high) for row in rows],
    }
    known = {title: values for title, values in panels.items() if any(values)}
    picture = intervals(names, known, 100, "% of dense", "Recovery with 95 % intervals")
    caption = (
        "Accuracy ÷ the dense model's, mean over all benchmarks, including those where dense is at its floor. "
        "Chance-corrected: only the accuracy above the floor, over the benchmarks where dense is significantly above "
        "it. Lines are 95\N{NO-BREAK SPACE}% intervals."
    )
    return {"recovery": {"title": "Recovery", "picture": picture, "caption": caption}}


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


def _models(config: SweepConfig) -> list[str]:
    """The sources of the models that are pruned."""
    return list(dict.fromkeys(cell.run.model.source for cell in sweep_cells(config)))


def _page(
    config: SweepConfig,
    measured: Sequence[tuple[SweepRow, Sequence[SweepBenchmarkRow]]],
    figures: Mapping[str, Mapping[str, Any]],
) -> str:
    rows = [row for row, _ in measured]
    return page_template("sweep.html.j2").render(
        title=f"Sweep of {', '.join(_models(config))}{_incomplete(rows)}",
        summary=_summary(rows),
        figures=list(figures.values()),
        rows=rows,
        recovered=_recovered(rows),
        benchmarks=len(config.benchmarks),
        measured=[(row, benchmark_rows) for row, benchmark_rows in measured if benchmark_rows],
        settings=_shared(config),
    )


def _markdown(config: SweepConfig, rows: Sequence[SweepRow], figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Summary, table and curves, for the run's page in Prefect."""
    models = [model.replace("`", "'") for model in _models(config)]  # a name must not end its code span
    title = f"# Sweep of {', '.join(f'`{model}`' for model in models)}{_incomplete(rows)}"
    lines = [title, "", _plain(_summary(rows)), ""]
    names = _columns(rows)
    lines += [f"| setting | {' | '.join(names)} |", f"|:--|{'--:|' * len(names)}"]
    for row in rows:
        values = [*_shown(row, rows), *[""] * len(names)][: len(names)]
        lines.append(f"| {' | '.join(map(_plain, [row.label, *values]))} |")
    for name, figure in figures.items():
        lines += ["", f"## {figure['title']}", "", figure["caption"], "", markdown_picture(name, figure["picture"])]
    return "\n".join([*lines, ""])


def _incomplete(rows: Sequence[SweepRow]) -> str:
    return " (incomplete)" if any(row.error for row in rows) else ""


def _plain(text: str) -> str:
    """Escape markup, and the "|" that would end a table cell."""
    return str(Markup.escape(text)).replace("|", "&#124;")
