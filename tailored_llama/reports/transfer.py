"""The report of a transfer: the heat map, the table, and the findings in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from tailored_llama.config import DENSE, UNREAD_BY_TRANSFER, UNTUNED_MODEL, RunConfig
from tailored_llama.evaluation import (
    DIFFERENCE,
    MEAN,
    OTHERS,
    OWN,
    RESAMPLES,
    TransferCell,
    TransferRow,
    field_of,
    read_transfer,
    transfer_rows,
)
from tailored_llama.reports.comparison_plots import heat_map
from tailored_llama.reports.figures import Picture
from tailored_llama.reports.parts import markdown_picture, number, page_template, points, settings_of
from tailored_llama.store import write_rows

_LEGEND = (
    "Each cell has the accuracy, in brackets if it is not significantly above the floor, and the gain over the pruned "
    "model in points, {mark} if its paired 95 % interval excludes zero. Column others: the mean gain on the benchmarks "
    "that the model was not tuned on. Row generic: one adapter, tuned on all benchmarks with as many examples in total."
)


STAGE, VERSION = "transfer", 3


def write_transfer(config: RunConfig, cells: Sequence[TransferCell], *, out: Path) -> None:
    """Stage: write `transfer.parquet`, `transfer.html`, and `transfer.md` with the heat map, `gains.png`.

    Raises:
        InputError: as `transfer_rows`.
    """
    rows = transfer_rows(cells, config.seed)
    write_rows(out / "transfer.parquet", rows, TransferRow)
    picture = _picture(rows)
    (out / "transfer.html").write_text(_page(config, rows, picture), encoding="utf-8")
    (out / "transfer.md").write_text(_markdown(config, rows, picture), encoding="utf-8")
    picture.save_png(out / "gains.png")


def bounds(row: TransferRow) -> str:
    """The 95 % interval of a gain, in points."""
    low, high = (None if end is None else 100 * end for end in (row.gain_low, row.gain_high))
    return f"{number(low, 1)} to {number(high, 1)}"


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
    every = len(field_of(rows)[1])
    where = {key: "all benchmarks" if len(names) == every else ", ".join(names) for key, names in failed.items()}
    return [f"{model} failed on {where[model, error]}: {error}" for model, error in failed]


def accuracy(row: TransferRow) -> str:
    """An accuracy, in brackets if it is not significantly above the floor."""
    if row.accuracy is None:
        return "failed"
    return number(row.accuracy) if row.above_floor else f"({number(row.accuracy)})"


def marked(row: TransferRow) -> str:
    """A gain in points, with * if it is significant; empty for None."""
    return "" if row.gain is None else points(row.gain) + "*" * row.significant


def transfer_table(folder: Path) -> Group:
    """The terminal table of a transfer's folder, with findings and failures below it."""
    rows = read_transfer(folder)
    models, names, field = field_of(rows)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("tuned on", overflow="fold")
    for name in (*names, "others"):
        table.add_column(name.replace("_", "_\n"), justify="right", overflow="fold")
    for model in models:
        model_rows = [field[model, name] for name in names]
        cells = [f"{accuracy(row).replace('0.', '.')}\n{marked(row)}" for row in model_rows]  # so that seven fit
        cells.append(f"\n{marked(field[model, OTHERS])}")
        table.add_row(*map(escape, (model.replace("_", "_\n"), *cells)))
    return Group(table, *map(escape, [_LEGEND.format(mark="*"), *findings(rows), *failures(rows)]))


def _title(config: RunConfig, rows: Sequence[TransferRow]) -> str:
    incomplete = " (incomplete)" if any(row.error for row in rows) else ""
    healed = " and healed" if config.healing.tokens else ""
    return f"Transfer on {config.model.source}, pruned{healed} at ratio {config.pruning.ratios[0]:g}{incomplete}"


def _markdown(config: RunConfig, rows: Sequence[TransferRow], picture: Picture) -> str:
    """Findings, table and heat map, for the run's page in Prefect."""
    models, names, field = field_of(rows)
    model = config.model.source.replace("`", "'")  # keep the name in its code span, where nothing is markup
    lines = [f"# {_title(config, rows).replace(config.model.source, f'`{model}`')}", ""]
    lines += [line for text in (*findings(rows), *map(Markup.escape, failures(rows))) for line in (text, "")]
    lines += [f"| tuned on | {' | '.join(names)} | others |", "|:--|" + "--:|" * (len(names) + 1)]
    for model in models:
        cells = [f"{accuracy(field[model, name])} {_bold(field[model, name])}".strip() for name in names]
        cells.append(_bold(field[model, OTHERS]))
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _LEGEND.format(mark="bold"), "", markdown_picture("gains", picture), ""])


def _bold(row: TransferRow) -> str:
    return f"**{points(row.gain)}**" if row.significant else marked(row)


def _picture(rows: Sequence[TransferRow]) -> Picture:
    models, names, field = field_of(rows)
    grid = {model: [field[model, name] for name in names] for model in models}
    gains = [[np.nan if row.gain is None else 100 * row.gain for row in line] for line in grid.values()]
    return heat_map(
        models,
        names,
        np.array(gains),
        [[f"{accuracy(row)}\n{marked(row)}".strip() for row in line] for line in grid.values()],
        np.array([[row.significant for row in line] for line in grid.values()]),
        sum(model not in names for model in models),
        ("tuned on", "scored on"),
        "points",
    )


def _page(config: RunConfig, rows: Sequence[TransferRow], picture: Picture) -> str:
    models, names, field = field_of(rows)
    grid = {model: [field[model, name] for name in names] for model in models}
    lead, *rest = findings(rows) or ["No adapter could be compared."]
    return page_template("transfer.html.j2").render(
        title=_title(config, rows),
        lead=lead,
        notes=rest,
        failures=failures(rows),
        picture=picture,
        names=names,
        grid=grid,
        means={model: field[model, OTHERS] for model in models},
        columns=[next((row for row in rows if row.benchmark == name and row.metric), None) for name in names],
        formats={"accuracy": accuracy, "bounds": bounds},
        config=config,
        resamples=RESAMPLES,
        settings={name: fields for name, fields in settings_of(config).items() if name not in UNREAD_BY_TRANSFER},
    )
