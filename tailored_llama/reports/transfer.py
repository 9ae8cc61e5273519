"""The report of a transfer: the heat map, the table, and the findings in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Patch, Rectangle

from tailored_llama.config import DENSE, UNREAD_BY_TRANSFER, UNTUNED_MODEL, RunConfig
from tailored_llama.evaluation import DIFFERENCE, MEAN, OTHERS, OWN, TransferRow, TransferScore, field_of, transfer_rows
from tailored_llama.reports.figures import COLOURS, Picture, new_figure, styled, wrap_name
from tailored_llama.reports.pages import settings_of, write_page
from tailored_llama.reports.parts import number, points
from tailored_llama.reports.tables import Cell, Column, Table, store_table, table_row
from tailored_llama.store import write_rows

_LEGEND = (
    "Each cell has the accuracy, in brackets if it is not significantly above the floor, and the gain over the pruned "
    "model in points, with * if its paired 95 % interval excludes zero. Column others: the mean gain on the benchmarks "
    "that the model was not tuned on. Row generic: one adapter, tuned on all benchmarks with as many examples in total."
)


def write_transfer(config: RunConfig, cells: Sequence[TransferScore[Path]], *, out: Path) -> None:
    """Stage: write `transfer.parquet`, `table.json`, `transfer.html`, and `transfer.md` with the heat map, `gains.png`.

    Raises:
        InputError: as `transfer_rows`.
    """
    rows = transfer_rows(cells, config.seed)
    write_rows(out / "transfer.parquet", rows, TransferRow)
    picture, failed, table = _picture(rows), failures(rows), _table(rows)
    store_table(replace(table, notes=(*table.notes, *findings(rows), *failed)), out)
    healed = " and healed" if config.healing.tokens else ""
    how = f"pruned{healed} at ratio {config.pruning.ratios[0]:g}{' (incomplete)' if failed else ''}"
    context = {
        "title": f"Transfer on {config.model.source}, {how}",
        "how": how,
        "findings": findings(rows) or ["No adapter could be compared."],
        "failures": failed,
        "picture": picture,
        "table": table,
        "config": config,
        "settings": settings_of(config, UNREAD_BY_TRANSFER),
    }
    write_page("transfer.html.j2", out / "transfer.html", context)
    write_page("transfer.md.j2", out / "transfer.md", context)
    picture.save_png(out / "gains.png")


def bounds(row: TransferRow) -> str:
    """The 95 % interval of a gain, in points; empty for None."""
    ends = (row.gain_low, row.gain_high)
    return " to ".join(number(100 * end, 1) for end in ends if end is not None)


def findings(rows: Sequence[TransferRow]) -> list[str]:
    """The results in sentences: gains on own and other benchmarks, their significance, and which say little."""
    models, names, field = field_of(rows)
    own, others, difference = (field[label, MEAN] for label in (OWN, OTHERS, DIFFERENCE))
    sentences = []
    if own.gain is not None:
        text = f"On the benchmark that it was tuned on, an adapter gains {points(own.gain)} points over the pruned "
        text += f"model (95 % interval {bounds(own)}; mean over {own.benchmarks} benchmarks), and on the others "
        text += f"{points(others.gain)} points ({bounds(others)}). The difference, {points(difference.gain)} "
        text += f"({bounds(difference)}), {'is significant' if difference.significant else 'may be chance'}."
        sentences.append(text)
    beside = [field[model, OTHERS] for model in models if model not in (*names, UNTUNED_MODEL)]
    if known := [f"{row.model} {points(row.gain)} ({bounds(row)})" for row in beside if row.gain is not None]:
        sentences.append(f"For comparison, over the same pruned model, on all benchmarks: {', '.join(known)}.")
    tuned = [row for row in rows if {row.model, row.benchmark} <= {*names} and row.gain is not None]
    if own.gain is not None:
        parts = []
        for where, on_own in (("own benchmark", True), ("others", False)):
            gains = [row for row in tuned if (row.model == row.benchmark) == on_own]
            signs = [np.sign(row.gain or 0) for row in gains if row.significant]
            parts.append(f"{signs.count(1)} of {len(gains)} cells up and {signs.count(-1)} down on the {where}")
        sentences.append(f"Significant: {'; '.join(parts)}. By chance alone, one cell in twenty would be significant.")
    weak = [row for name in names if (row := field.get((DENSE, name))) and row.above_floor is False]
    if listed := ", ".join(
        f"{r.benchmark} ({number(r.accuracy)} ± {number(r.stderr)} against {number(r.floor)})" for r in weak
    ):
        sentences.append(f"Dense itself is not significantly above the floor on {listed}: gains there say little.")
    return sentences


def failures(rows: Sequence[TransferRow]) -> list[str]:
    """One line for each error of a model, with the benchmarks that have no scores because of it."""
    failed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.error:
            failed.setdefault((row.model, row.error), []).append(row.benchmark)
    every = field_of(rows)[1]
    where = {key: "all benchmarks" if len(names) == len(every) else ", ".join(names) for key, names in failed.items()}
    return [f"{model} failed on {names}: {error}" for (model, error), names in where.items()]


def _table(rows: Sequence[TransferRow]) -> Table:
    """A row for every model, a column for every benchmark; without leading zeros, seven fit a terminal."""
    models, names, field = field_of(rows)
    columns = [Column("tuned on", left=True)]
    for name in names:
        known = next((one for one in rows if one.benchmark == name and one.metric), None)
        under = (f"{known.metric}", f"floor {number(known.floor)}", f"n = {number(known.examples, 0)}") if known else ()
        columns.append(Column(name.replace("_", "_\n"), under=under))
    lines = []
    for model in models:
        others = field[model, OTHERS]
        cells = [_cell(field[model, name]) for name in names]
        cells.append(Cell(_gain(others), tuple(filter(None, [bounds(others)])), f"\n{_gain(others)}"))
        lines.append(table_row(model.replace("_", "_\n"), *cells))
    return Table((*columns, Column("others")), tuple(lines), (_LEGEND,))


def _cell(one: TransferRow) -> Cell:
    error = "" if one.accuracy is None else f"± {number(one.stderr)}"
    return Cell(_shown(one), tuple(filter(None, (error, bounds(one)))), _shown(one).replace("0.", ".", 1))


def _shown(one: TransferRow) -> str:
    """The accuracy, in brackets if it is not significantly above the floor, and the gain in a second line."""
    if one.accuracy is None:
        return "failed"
    accuracy = number(one.accuracy)
    return "\n".join(filter(None, [accuracy if one.above_floor else f"({accuracy})", _gain(one)]))


def _gain(one: TransferRow) -> str:
    """A gain in points, with * if it is significant; empty for None."""
    return "" if one.gain is None else points(one.gain) + "*" * one.significant


@styled
def _picture(rows: Sequence[TransferRow]) -> Picture:
    """A heat map of the gains, blue above 0 and orange below; an adapter's own benchmark is framed.

    Models that are not tuned on a single benchmark stand apart, above the others.
    """
    models, names, field = field_of(rows)
    cells = [[field[model, name] for name in names] for model in models]
    limit = max([1, *(math.ceil(abs(100 * one.gain)) for line in cells for one in line if one.gain is not None)])
    width = min(120, max(64, 820 // len(names)))  # of a cell, in CSS pixels
    height = 20 * max(_shown(one).count("\n") + 1 for line in cells for one in line) + 14
    lead = sum(model not in names for model in models)
    at = [i + 0.25 * (i >= lead) for i in range(len(models))]
    figure = new_figure(110 + height * (len(models) + 1), width=max(560, 160 + width * len(names)))
    axes = figure.subplots()
    for i, line in enumerate(cells):
        for j, one in enumerate(line):
            box: Any = {"xy": (j - 0.5, at[i] - 0.5), "width": 1, "height": 1}
            if one.gain is not None:
                axes.add_patch(Rectangle(**box, linewidth=0, **_shade(100 * one.gain / limit)))
            axes.add_patch(Rectangle(**box, fill=False, edgecolor=COLOURS["grid"], linewidth=1))
            weight = "bold" if one.significant else "normal"
            axes.text(j, at[i], _shown(one), ha="center", va="center", weight=weight, linespacing=1.35)
    for i, j in ((models.index(name), j) for j, name in enumerate(names) if name in models):
        frame = Rectangle((j - 0.5, at[i] - 0.5), 1, 1, fill=False, edgecolor=COLOURS["ink"], linewidth=2)
        axes.add_patch(frame).set_zorder(3)
    axes.set_xlim(-0.52, len(names) - 0.48)
    axes.set_ylim(at[-1] + 0.52, -0.52)
    wrapped = [wrap_name(name) for name in names]
    if any(8 * len(line) > width for name in wrapped for line in name.split("\n")):  # horizontal names would overlap
        axes.set_xticks(range(len(names)), names, rotation=45, ha="left", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(names)), wrapped)
    axes.set_yticks(at, models)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("scored on", labelpad=10)
    axes.set_ylabel("tuned on", labelpad=10, y=1 - (lead + len(models)) / 2 / len(models))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    shades: list[Any] = [_shade(part) for part in (-1, -0.5, 0.5, 1)]
    shades.insert(2, {"facecolor": "none", "edgecolor": COLOURS["grid"]})
    steps = [f"{limit * part:+g}".replace("-", "−").replace("+0", "0") for part in (-1, -0.5, 0, 0.5, 1)]
    steps[-1] += " points"
    handles = [Patch(label=step, **shade) for step, shade in zip(steps, shades, strict=True)]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), borderpad=0)
    label = f"Heat map of points: tuned on {', '.join(models)}; scored on {', '.join(names)}"
    return Picture(figure, label)


def _shade(part: float) -> dict[str, Any]:
    """Colour of a value from −1 to 1 on the scale, faint enough to read the text on it."""
    return {"facecolor": COLOURS["tailored" if part > 0 else "line-2"], "alpha": 0.55 * abs(part)}
