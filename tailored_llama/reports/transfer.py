"""The report of a transfer: the heat map, the table, and the findings in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tailored_llama.config import DENSE, UNREAD_BY_TRANSFER, UNTUNED_MODEL, RunConfig
from tailored_llama.evaluation import DIFFERENCE, MEAN, OTHERS, OWN, TransferRow, TransferScore, field_of, transfer_rows
from tailored_llama.reports.comparison_plots import HeatCell, heat_map
from tailored_llama.reports.figures import Picture
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


def _picture(rows: Sequence[TransferRow]) -> Picture:
    models, names, field = field_of(rows)
    grid = {
        model: [
            HeatCell(math.nan if one.gain is None else 100 * one.gain, _shown(one), one.significant)
            for one in (field[model, name] for name in names)
        ]
        for model in models
    }
    lead = sum(model not in names for model in models)
    return heat_map(grid, names, lead, ("tuned on", "scored on"), "points")
