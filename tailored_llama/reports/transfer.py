"""The report of a transfer: the heat map, the table, and the findings in words."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

from tailored_llama.config import DENSE, UNREAD_BY_TRANSFER, UNTUNED_MODEL, RunConfig
from tailored_llama.evaluation import DIFFERENCE, MEAN, OTHERS, OWN, TransferRow, TransferScore, field_of, transfer_rows
from tailored_llama.reports.figures import COLOURS, Picture, name_ticks, new_figure, styled
from tailored_llama.reports.pages import Report, Section, settings_of, write_pages
from tailored_llama.reports.parts import accuracy_of, listed, number, points
from tailored_llama.reports.tables import Cell, Column, Table, table_row
from tailored_llama.store import write_rows

_LEGEND = (
    "Each cell has the accuracy, in brackets if it is not significantly above the floor, and the gain over the pruned "
    "model in points, with * if its paired 95 % interval excludes zero. Column others: the mean gain on the benchmarks "
    "that the model was not tuned on. Row generic: one adapter, tuned on all benchmarks with as many examples in total."
)


def write_transfer(config: RunConfig, cells: Sequence[TransferScore[Path]], *, out: Path) -> None:
    """Stage: write the pages and `transfer.parquet`.

    Raises:
        InputError: as `transfer_rows`.
    """
    rows = transfer_rows(cells, config.seed)
    write_rows(out / "transfer.parquet", rows, TransferRow)
    failed, healed = failures(rows), " and healed" if config.healing.tokens else ""
    how = f"pruned{healed} at ratio {config.pruning.ratios[0]:g}{' (incomplete)' if failed else ''}"
    report = Report(
        f"Transfer on {config.model.source}, {how}",
        findings(rows) or ["No adapter could be compared."],
        failed,
        [Section("Tuned on one, scored on all", {"gains": _picture(rows)}, _table(rows))],
        settings_of(config, UNREAD_BY_TRANSFER),
    )
    write_pages(report, "transfer", out, config=config)


def bounds(row: TransferRow) -> str:
    """The 95 % interval of a gain, in points; empty for None."""
    ends = (row.gain_low, row.gain_high)
    return " to ".join(number(100 * end, 1) for end in ends if end is not None)


def findings(rows: Sequence[TransferRow]) -> list[str]:
    """The results in sentences: gains on own and other benchmarks, their significance, and which say little."""
    models, names, field = field_of(rows)
    own_row, others, difference = (field[label, MEAN] for label in (OWN, OTHERS, DIFFERENCE))
    sentences = []
    if own_row.gain is not None:
        sentences.append(
            f"On the benchmark that it was tuned on, an adapter gains {points(own_row.gain)} points over the pruned "
            f"model (95 % interval {bounds(own_row)}; mean over {own_row.benchmarks} benchmarks), and on the others "
            f"{points(others.gain)} points ({bounds(others)}). The difference, {points(difference.gain)} "
            f"({bounds(difference)}), {'is significant' if difference.significant else 'may be chance'}."
        )
        counts, tuned = [], [row for row in rows if {row.model, row.benchmark} <= {*names}]
        for where, on_own in (("own benchmark", True), ("others", False)):
            gains = [row for row in tuned if row.gain is not None and (row.model == row.benchmark) == on_own]
            signs = [np.sign(row.gain or 0) for row in gains if row.significant]
            counts.append(f"{signs.count(1)} of {len(gains)} cells up and {signs.count(-1)} down on the {where}")
        sentences.append(f"Significant: {'; '.join(counts)}. By chance alone, one cell in twenty would be significant.")
    beside = [field[model, OTHERS] for model in models if model not in (*names, UNTUNED_MODEL)]
    if known := [f"{row.model} {points(row.gain)} ({bounds(row)})" for row in beside if row.gain is not None]:
        sentences.append(f"For comparison, over the same pruned model, on all benchmarks: {listed(known)}.")
    if weak := [row for name in names if (row := field.get((DENSE, name))) and row.above_floor is False]:
        where = ", ".join(f"{row.benchmark} ({accuracy_of(row).text} against {number(row.floor)})" for row in weak)
        sentences.append(f"Dense itself is not significantly above the floor on {where}: gains there say little.")
    return sentences


def failures(rows: Sequence[TransferRow]) -> list[str]:
    """One line for each error of a model, with the benchmarks that have no scores because of it."""
    failed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.error:
            failed.setdefault((row.model, row.error), []).append(row.benchmark)
    return [f"{model} failed on {listed(names)}: {error}" for (model, error), names in failed.items()]


def _table(rows: Sequence[TransferRow]) -> Table:
    """A row for every model, a column for every benchmark; without leading zeros, seven fit a terminal."""
    models, names, field = field_of(rows)
    columns = [Column("tuned on", left=True)]
    for name in names:
        known = next((row for row in rows if row.benchmark == name and row.metric), None)
        under = (f"{known.metric}", f"floor {number(known.floor)}", f"n = {number(known.examples, 0)}") if known else ()
        columns.append(Column(name.replace("_", "_\n"), under=under))
    lines = []
    for model in models:
        others = field[model, OTHERS]
        cells = [_cell(field[model, name]) for name in names]
        cells.append(Cell(_gain(others), (bounds(others),), f"\n{_gain(others)}"))
        lines.append(table_row(model.replace("_", "_\n"), *cells))
    return Table((*columns, Column("others")), tuple(lines), (_LEGEND,))


def _cell(row: TransferRow) -> Cell:
    error = "" if row.accuracy is None else f"± {number(row.stderr)}"
    return Cell(_shown(row), (error, bounds(row)), _shown(row).replace("0.", ".", 1))


def _shown(row: TransferRow) -> str:
    """The accuracy, in brackets if it is not significantly above the floor, and the gain in a second line."""
    if row.accuracy is None:
        return "failed"
    accuracy = number(row.accuracy)
    return "\n".join(filter(None, [accuracy if row.above_floor else f"({accuracy})", _gain(row)]))


def _gain(row: TransferRow) -> str:
    """A gain in points, with * if it is significant; empty for None."""
    return "" if row.gain is None else points(row.gain) + "*" * row.significant


@styled
def _picture(rows: Sequence[TransferRow]) -> Picture:
    models, names, field = field_of(rows)
    gains = [row.gain for row in rows if row.gain is not None and row.benchmark in names]
    most = max([1, *(math.ceil(abs(100 * gain)) for gain in gains)])
    figure = new_figure(110 + 54 * (len(models) + 1), width=max(560, 160 + 112 * len(names)))
    axes = figure.subplots()
    for i, model in enumerate(models):
        for j, name in enumerate(names):
            cell, box = field[model, name], ((j - 0.5, i - 0.5), 1, 1)
            edge: Any = {"edgecolor": COLOURS["grid"], "linewidth": 1}
            if model == name:
                edge = {"edgecolor": COLOURS["ink"], "linewidth": 2, "zorder": 3}
            if cell.gain is not None:
                colour = COLOURS["tailored" if cell.gain > 0 else "line-2"]
                shade = 0.55 * abs(100 * cell.gain / most)  # faint enough to read the text on it
                axes.add_patch(Rectangle(*box, linewidth=0, facecolor=colour, alpha=shade))
            axes.add_patch(Rectangle(*box, fill=False, **edge))
            weight = "bold" if cell.significant else "normal"
            axes.text(j, i, _shown(cell), ha="center", va="center", weight=weight, linespacing=1.35)
    name_ticks(axes, names, 112, "left")
    axes.set_yticks(range(len(models)), models)
    axes.set(xlim=(-0.52, len(names) - 0.48), ylim=(len(models) - 0.48, -0.52))
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("scored on", labelpad=10)
    axes.set_ylabel("tuned on", labelpad=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    label = f"Heat map of points: tuned on {', '.join(models)}; scored on {', '.join(names)}"
    return Picture(figure, label)
