"""The report of a run: a table, a self-contained HTML page, and a Markdown summary.

Only the scores are required; the report leaves out what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter

from tailored_llama.config import DENSE, TUNED_DENSE, RunConfig
from tailored_llama.errors import InputError
from tailored_llama.evaluation import HEALED, MEAN, MODELS, TAILORED, Z95, ModelRow, RecoveryRow, RecoveryTable
from tailored_llama.pruning import Split, read_tried
from tailored_llama.reports import text
from tailored_llama.reports.diagnosis import Diagnosis, by_signature, diagnose, diagnosis_lines
from tailored_llama.reports.figures import COLOURS, WIDTH, Picture, new_figure, styled, wrap_name, xy
from tailored_llama.reports.inputs import ReportInputs, RunResults, timing
from tailored_llama.reports.pages import settings_of, write_page
from tailored_llama.reports.parts import accuracy_of, megabytes, number, percent, share, share_cell, span, speed_table
from tailored_llama.reports.tables import Cell, Column, Table, store_table, table_row
from tailored_llama.store import read_table, write_rows
from tailored_llama.training import LOG_SCHEMA, is_better

_MARKDOWN_BYTES = 20_000  # of a Prefect artifact without its pictures


def write_report(inputs: ReportInputs, *, out: Path) -> None:
    """Stage: write the tables, `report.html`, and Markdown pages with PNG files into an existing folder.

    The tables are `recovery.parquet` (`RecoveryRow`; every ratio repeats the dense models' rows), `models.parquet`
    (`ModelRow`), `diagnoses.parquet` (`Diagnosis`: what went wrong) and `table.json`, for a terminal. `report.md` has
    the table and the accuracies, `plots.md` the other pictures.

    Raises:
        InputError: scores of a benchmark have different examples or metrics, or a file is missing or broken.
    """
    runs = [run for run in inputs.runs if run.table.rows]
    if not runs:
        raise InputError("report: no model has scores; allowed: at least one scored benchmark")
    tables, how = [run.table for run in runs], text.gained_by(inputs.config)
    sizes = {(row.ratio, row.model): row for table in tables for row in table.models.values()}
    rows = [row for table in tables for row in table.rows]
    write_rows(out / "recovery.parquet", rows, RecoveryRow)
    write_rows(out / "models.parquet", list(sizes.values()), ModelRow)
    diagnoses = [one for run in runs for one in diagnose(run, inputs.config)]
    write_rows(out / "diagnoses.parquet", diagnoses, Diagnosis)
    parts, notes = [_shown(run, inputs.config) for run in runs], report_notes(runs)
    pictures = {name: picture for part in parts for name, picture in part["pictures"].items()}
    sentences = [(text.run_name(table.ratio).capitalize(), text.size_sentence(table)) for table in tables]
    legend = ["Accuracy ± standard error; recovery with its 95 % interval."]
    legend += [f"{name}. {told}" if len(tables) > 1 else told for name, told in sentences if told]
    shown = accuracies(tables, how)
    store_table(replace(shown, notes=(*legend, *notes, *diagnosis_lines(diagnoses))), out)
    context = {
        "title": text.title(inputs),
        "rows": rows,
        "accuracies": shown,
        "how": how,
        "variant": text.VARIANTS[inputs.config.tuning.variant] if inputs.config else "an adapter",
        "inputs": inputs,
        "missing": [f"Incomplete: {name} failed: {error}" for name, error in inputs.failed.items()],
        "diagnoses": by_signature(diagnoses),
        "diagnosed": diagnosis_lines(diagnoses),
        "is_better": is_better,
        "config": inputs.config,
        "runs": parts,
        "dense": tables[0].size(DENSE),
        "speeds": _speeds(runs),
        "notes": notes,
        "pictures": pictures,
        "settings": settings_of(inputs.config) if inputs.config else {},
    }
    for template, file in (("run.html.j2", "report.html"), ("run.md.j2", "report.md"), ("plots.md.j2", "plots.md")):
        write_page(template, out / file, context)
    if (out / "report.md").stat().st_size > _MARKDOWN_BYTES:  # means and names instead
        brief = {"accuracies": accuracies(tables, how, brief=True), "diagnosed": diagnosis_lines(diagnoses, brief=True)}
        write_page("run.md.j2", out / "report.md", context | brief | {"brief": True})
    for name, picture in pictures.items():
        picture.save_png(out / f"{name}.png")


def _speeds(runs: Sequence[RunResults]) -> Table | None:
    """The speed of the dense model and of each pruned one, at the largest batch; None if nothing was timed."""
    pruned = [replace(row, checkpoint=text.run_name(run.table.ratio)) for run in runs if (row := timing(run.profile))]
    dense = [row for run in runs if (row := timing(run.profile, "against"))]
    return speed_table([*dense[:1], *pruned], DENSE) if pruned else None


def _shown(run: RunResults, config: RunConfig | None) -> dict[str, Any]:
    """What the templates show of one run; its pictures are by kind, and by the names of their files in `pictures`."""
    pictures = {"accuracy": _accuracies(run.table)}
    if run.plan and len(tried := read_tried(run.plan)) > 1:
        pictures["split"] = _split(tried)
    if run.adapters:
        pictures["losses"] = _losses(run.adapters)
    ending = "" if run.table.ratio is None else f"-{run.table.ratio}"
    return {
        "name": text.run_name(run.table.ratio),
        "table": run.table,
        "compared": {name: found for name in run.adapters if (found := run.comparison(name))},
        "summary": text.summary(run.table, config),
        "pictures": {f"{kind}{ending}": picture for kind, picture in pictures.items()},
        **dict.fromkeys(("split", "losses")),
        **pictures,
    }


def accuracies(tables: Sequence[RecoveryTable], how: str, brief: bool = False) -> Table:
    """Every benchmark of every run; if `brief`, only their means.

    `how` are the steps from the pruned to the tailored model. The tuned dense model and files of fewer bits, where
    there are any, stand behind the others.
    """
    beside = list(dict.fromkeys(row.model for table in tables for row in table.rows))
    beside = [model for model in beside if model not in (*MODELS, HEALED)]
    columns = (
        Column("benchmark", left=True),
        Column("examples", wide=True),
        Column("floor", wide=True),
        *(Column(model, swatch=model) for model in MODELS),
        Column(f"gained by\n{how}", wide=True),
        Column("recovery"),
        Column("chance-\ncorrected"),
        *(Column(model, wide=True) for model in beside),
    )
    rows = []
    for table in tables:
        rows += [table_row(text.run_name(table.ratio).capitalize())] if len(tables) > 1 else []
        for name in table.lines[-1:] if brief else table.lines:
            known, shares = table.any_row(name), [Cell("–")] * 3
            if row := table.row(TAILORED, name):  # a mean says over how many benchmarks it is
                over = f"over {row.cc_benchmarks} of {len(table.benchmarks)}" if name == MEAN else ""
                shares = [
                    share_cell(row.gain, row.gain_low, row.gain_high),
                    share_cell(row.recovery, row.recovery_low, row.recovery_high),
                    share_cell(row.chance_corrected, row.cc_low, row.cc_high, over),
                ]
            label = "mean" if name == MEAN else name
            cells = [Cell(label, (known.metric,) if known.metric else (), label)]
            cells += [Cell(number(known.examples, 0)), Cell(number(known.floor))]
            cells += [accuracy_of(table.row(model, name)) for model in MODELS]
            cells += [*shares, *(_beside(table.row(model, name)) for model in beside)]
            rows.append(table_row(*cells, bold=name == MEAN))
    return Table(columns, tuple(rows))


def _beside(row: RecoveryRow | None) -> Cell:
    """An accuracy, below it the recovery with its interval and, of a file, its size."""
    if row is None:
        return Cell("–")
    recovery = "" if row.recovery is None else f"{percent(row.recovery)} of {DENSE}"
    size = "" if row.bytes is None else megabytes(row.bytes)
    under = (recovery, span(row.recovery_low, row.recovery_high), size)
    return replace(accuracy_of(row), under=tuple(filter(None, under)))


def report_notes(runs: Sequence[RunResults]) -> list[str]:
    """What to know of the accuracies: what the tuned dense model has, and where a recovery says little."""
    notes, first, shares = text.floor_notes([run.table for run in runs]), runs[0].table, []
    tuned = [(name, row) for name in first.lines if (row := first.row(TUNED_DENSE, name)) and row.accuracy is not None]
    if not tuned:
        return notes
    told = f"Dense, tuned on the same shots: {', '.join(f'{name} {accuracy_of(row).text}' for name, row in tuned)}."
    for run in runs:
        if (row := run.beside_tuned) and row.recovery is not None:
            named = f"{text.run_name(run.table.ratio)} " if len(runs) > 1 else ""
            shares.append(named + share(row.recovery, row.recovery_low, row.recovery_high))
    return [f"{told} Tailored ÷ dense, tuned: {', '.join(shares)}." if shares else told, *notes]


@styled
def _accuracies(table: RecoveryTable) -> Picture:
    """Bars of accuracy per benchmark with 95 % intervals, and each benchmark's floor as a dashed line."""
    names, series = table.benchmarks, {}
    for model in (DENSE, TUNED_DENSE, *MODELS[1:]):
        known = [(i, row) for i, name in enumerate(names) if (row := table.row(model, name))]
        if known:
            series[model] = [(i, row.accuracy or 0.0, Z95 * (row.stderr or 0.0)) for i, row in known]
    floors = [table.any_row(name).floor for name in names]
    colours = {model: COLOURS["line-1" if model == TUNED_DENSE else model] for model in series}
    least = WIDTH // 2 + 110 * max(0, len(series) - len(MODELS))  # room for the legend
    figure = new_figure(340, width=min(WIDTH, max(least, 80 + 180 * len(names))))
    axes, width = figure.subplots(), 0.78 / len(series)
    for nth, (model, bars) in enumerate(series.items()):
        places, values, whiskers = zip(*bars, strict=True)
        at = [place + (nth - (len(series) - 1) / 2) * width for place in places]
        axes.bar(at, values, 0.92 * width, color=colours[model])
        axes.errorbar(at, values, whiskers, fmt="none", ecolor=COLOURS["ink"], elinewidth=1.2, capsize=3)
    for i, floor in enumerate(floors):
        axes.hlines(floor, i - 0.45, i + 0.45, COLOURS["ink"], linestyles=(0, (4, 2)), linewidth=1.5)
    axes.set_xticks(range(len(names)), [wrap_name(name) for name in names])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(names) - 0.4)
    tops = [value + whisker for bars in series.values() for _, value, whisker in bars]
    axes.set_ylim(0, min(1.0, max([*tops, *floors, 0.1]) + 0.05))
    axes.set_ylabel("accuracy")
    axes.grid(axis="y")
    handles: list[Any] = [Patch(color=colour, label=model) for model, colour in colours.items()]
    handles.append(Line2D([], [], color=COLOURS["ink"], dashes=(4, 2), linewidth=1.5, label="floor"))
    figure.legend(handles=handles, loc="outside upper left", ncols=5, borderpad=0)
    return Picture(figure, "Accuracy by benchmark: " + ", ".join(series) + " and the floor")


@styled
def _split(tried: Sequence[Split]) -> Picture:
    """What each split of the ratio between tokens and layers costs, the chosen one ringed."""
    figure = new_figure(260, width=WIDTH // 2 + 110)
    axes, costs = figure.subplots(), [split.nats_per_byte or 0.0 for split in tried]
    tokens, best = [split.tokens for split in tried], int(np.argmin(costs))
    axes.plot(tokens, costs, color=COLOURS["pruned"], linewidth=2, marker="o", markersize=5)
    axes.plot(tokens[best], costs[best], "o", markersize=12, markerfacecolor="none", color=COLOURS["tailored"])
    for at, split in zip(tokens, tried, strict=True):
        place = (at, split.nats_per_byte or 0.0)
        axes.annotate(f"{split.body_ratio:.0%}", place, (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens kept; at each point, what the layers lose")
    axes.set_ylabel("nats per byte")
    axes.margins(y=0.15)
    axes.grid(axis="y")
    return Picture(figure, "Loss on held-out prompts by the number of tokens that stay")


@styled
def _losses(folders: Mapping[str, Path]) -> Picture:
    """Training loss of every step and held-out loss of every epoch, one panel for each benchmark's adapter."""
    columns = min(3, len(folders))
    rows = math.ceil(len(folders) / columns)
    figure = new_figure(60 + 225 * rows, width=WIDTH if columns > 1 else WIDTH // 2)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    best: Any = {"markersize": 11, "markerfacecolor": "none", "color": COLOURS["tailored"], "marker": "o"}
    for axes, (name, folder) in zip(panels, folders.items(), strict=False):
        log = read_table(folder / "log.parquet", LOG_SCHEMA).to_pydict()
        train, held = (
            [(step, loss) for step, loss in zip(log["step"], log[column], strict=True) if loss is not None]
            for column in ("loss", "held_out_loss")
        )
        axes.plot(*xy(train), color=COLOURS["dense"], linewidth=1.5, label="training")
        axes.plot(*xy(held), color=COLOURS["tailored"], linewidth=2, marker="o", markersize=5, label="held out")
        if held:
            axes.plot(*xy([min(held, key=lambda point: point[1])]), linestyle="none", label="adapter kept", **best)
        axes.set_title(name)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.05, y=0.12)
        axes.grid(axis="y")
    for axes in panels[len(folders) :]:
        axes.remove()
    for axes in panels[max(0, len(folders) - columns) : len(folders)]:  # the bottom panel of each column
        axes.set_xlabel("step")
    for axes in panels[: len(folders) : columns]:
        axes.set_ylabel("loss")
    figure.legend(handles=panels[0].get_lines(), loc="outside upper left", ncols=3, borderpad=0)
    return Picture(figure, "Training and held-out loss by benchmark")
