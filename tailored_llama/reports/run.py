"""The report of a run: what pruning took and tuning brought back. Only the scores are required."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from tailored_llama.config import DENSE, TUNED_DENSE
from tailored_llama.evaluation import MEAN, MODELS, PRUNED, TAILORED, Z95, ModelRow, RecoveryRow
from tailored_llama.reports import text
from tailored_llama.reports.diagnosis import diagnose
from tailored_llama.reports.figures import COLOURS, WIDTH, Picture, name_ticks, new_figure, styled, xy
from tailored_llama.reports.inputs import ReportInputs, RunResults
from tailored_llama.reports.pages import Report, Section, first_sample, settings_of, write_pages
from tailored_llama.reports.parts import accuracy_of, cost_table, megabytes, number, percent, share_cell, span
from tailored_llama.reports.tables import Cell, Column, Table, table_row
from tailored_llama.store import read_table, write_rows
from tailored_llama.training import LOG_SCHEMA


def write_report(inputs: ReportInputs, *, out: Path) -> None:
    """Stage: write the pages, `recovery.parquet` and `models.parquet` into an existing folder.

    Every ratio repeats the dense models' rows. InputError: the log or the comparison of an adapter is broken.
    """
    runs, config = inputs.runs, inputs.config
    sizes = {(row.ratio, row.model): row for run in runs for row in run.models.values()}
    rows = [row for run in runs for row in run.rows]
    write_rows(out / "recovery.parquet", rows, RecoveryRow)
    write_rows(out / "models.parquet", list(sizes.values()), ModelRow)
    lead = [(run.name.capitalize(), text.summary(run, config)) for run in runs]
    missing = [f"Incomplete: {name} failed: {error}" for name, error in inputs.failed.items()]
    report = Report(
        text.title(inputs),
        [f"{name}. {told}" if len(runs) > 1 else told for name, told in lead if told],
        [*missing, *report_notes(runs), *diagnose(runs, config)],
        _sections(runs, inputs),
        settings_of(config),
    )
    write_pages(report, "report", out, config=config, inputs=inputs, rows=rows)


def _sections(runs: Sequence[RunResults], inputs: ReportInputs) -> list[Section]:
    """All that a report can have; pictures of a ratio have it in the names of their files."""
    bars, losses = dict[str, Picture](), dict[str, Picture]()
    for run in runs:
        ending = "" if run.ratio is None else f"-{run.ratio}"
        caption = run.name.capitalize() if len(runs) > 1 else ""
        bars[f"accuracy{ending}"] = _bars(run, caption)
        if run.adapters:
            losses[f"losses{ending}"] = _losses(run.adapters, caption)
    samples = [(name, first_sample(folder)) for name, folder in inputs.prompts.items()]
    return [
        Section("Accuracy and recovery", table=accuracies(runs)),
        Section("Accuracy by benchmark", bars),
        Section("Size", table=_sizes(runs)),
        Section("How tuning went", losses, _verdicts(runs)),
        Section("What the model is asked", samples=samples),
        Section("What it cost", table=cost_table(inputs.costs)),
    ]


def accuracies(runs: Sequence[RunResults]) -> Table:
    """Every benchmark of every run. A tuned dense model and files of fewer bits stand behind the others."""
    beside = list(dict.fromkeys(row.model for run in runs for row in run.rows))
    beside = [model for model in beside if model not in MODELS]
    columns = (
        Column("benchmark", left=True),
        Column("examples", wide=True),
        Column("floor", wide=True),
        *map(Column, MODELS),
        Column("gained by\ntuning", wide=True),
        Column("recovery"),
        Column("chance-\ncorrected"),
        *(Column(model, wide=True) for model in beside),
    )
    rows = []
    for run in runs:
        rows += [table_row(run.name.capitalize())] if len(runs) > 1 else []
        for name in run.lines:
            known, shares = run.any_row(name), [Cell("–")] * 3
            if row := run.row(TAILORED, name):  # a mean says over how many benchmarks it is
                over = f"over {row.cc_benchmarks} of {len(run.benchmarks)}" if name == MEAN else ""
                shares = [
                    share_cell(row.gain, row.gain_low, row.gain_high),
                    share_cell(row.recovery, row.recovery_low, row.recovery_high),
                    share_cell(row.chance_corrected, row.cc_low, row.cc_high, over),
                ]
            label = "mean" if name == MEAN else name
            cells = [Cell(label, (known.metric or "",), label)]
            cells += [Cell(number(known.examples, 0)), Cell(number(known.floor))]
            cells += [accuracy_of(run.row(model, name)) for model in MODELS]
            cells += [*shares, *(_beside(run.row(model, name)) for model in beside)]
            rows.append(table_row(*cells, bold=name == MEAN))
    legend = (
        "Gained = tailored − pruned, by tuning; recovery = tailored ÷ dense; chance-corrected = (tailored − floor) ÷ "
        "(dense − floor), where dense is significantly above its floor."
    )
    return Table(columns, tuple(rows), ("Accuracy ± standard error; recovery with its 95 % interval.", legend))


def _beside(row: RecoveryRow | None) -> Cell:
    """An accuracy, below it the recovery with its interval and, of a file, its size."""
    if row is None:
        return Cell("–")
    recovery = "" if row.recovery is None else f"{percent(row.recovery)} of {DENSE}"
    size = "" if row.bytes is None else megabytes(row.bytes)
    return replace(accuracy_of(row), under=(recovery, span(row.recovery_low, row.recovery_high), size))


def _sizes(runs: Sequence[RunResults]) -> Table:
    """The size and the perplexity of the dense model, and of each pruned one, as far as they are known."""
    models = [runs[0].size(DENSE), *(run.size(PRUNED) for run in runs)]
    rows = []
    for row in models:
        if row.parameters or row.perplexity:
            of = () if row.ratio is None else (f"ratio {row.ratio:g}",)
            whole = () if row.whole is None else (f"{percent(row.whole, 2)} whole",)
            counts = (number(row.parameters, 0), number(row.body, 0), Cell(number(row.vocab_size, 0), whole))
            rows.append(table_row(Cell(row.model, of), *counts, number(row.perplexity, 1), number(row.byte_perplexity)))
    titles = ("parameters", "outside the\nembeddings", "tokens", "perplexity\na token", "perplexity\na byte")
    return Table((Column("model", left=True), *map(Column, titles)), tuple(rows))


def _verdicts(runs: Sequence[RunResults]) -> Table:
    """Every adapter against none on held-out examples, which `tuning.keep = "better"` decides by."""
    rows = []
    for run in runs:
        for name in run.adapters:
            if comparison := run.comparison(name):
                label = Cell(name, (run.name,) * (len(runs) > 1))
                rows.append(table_row(label, text.verdict_line(comparison)))
    legend = (
        "Accuracy decides where it differs by more than its standard error; else the adapter is better if the loss is "
        "lower by more than its own."
    )
    columns = (Column("adapter against none", left=True), Column("verdict", left=True))
    return Table(columns, tuple(rows), (legend,))


def report_notes(runs: Sequence[RunResults]) -> list[str]:
    """Return notes on the accuracies: what the tuned dense model has, and where a recovery says little."""
    notes, first, shares = text.floor_notes(runs), runs[0], []
    tuned = [row for name in first.lines if (row := first.row(TUNED_DENSE, name)) and row.accuracy is not None]
    if not tuned:
        return notes
    told = f"Dense, tuned on the same shots: {', '.join(f'{row.benchmark} {accuracy_of(row).text}' for row in tuned)}."
    for run in runs:
        if (row := run.beside_tuned) and row.recovery is not None:
            named = f"{run.name} " if len(runs) > 1 else ""
            shares.append(f"{named}{percent(row.recovery)} ({span(row.recovery_low, row.recovery_high)})")
    return [f"{told} Tailored ÷ dense, tuned: {', '.join(shares)}." if shares else told, *notes]


@styled
def _bars(run: RunResults, caption: str) -> Picture:
    """Bars of accuracy per benchmark with 95 % intervals, and each benchmark's floor as a dashed line."""
    names, places = run.benchmarks, np.arange(len(run.benchmarks))
    models = [model for model in (DENSE, TUNED_DENSE, *MODELS[1:]) if any(run.row(model, name) for name in names)]
    least = WIDTH // 2 + 110 * (len(models) > len(MODELS))  # room for the legend
    figure = new_figure(340, width=min(WIDTH, max(least, 80 + 180 * len(names))))
    axes, width = figure.subplots(), 0.78 / len(models)
    whisker: Any = {"ecolor": COLOURS["ink"], "elinewidth": 1.2, "capsize": 3}
    for nth, model in enumerate(models):
        rows = [(i, row) for i, name in enumerate(names) if (row := run.row(model, name))]
        at = [i + (nth - (len(models) - 1) / 2) * width for i, _ in rows]
        values, errors = [row.accuracy or 0.0 for _, row in rows], [Z95 * (row.stderr or 0.0) for _, row in rows]
        colour = COLOURS["line-1" if model == TUNED_DENSE else model]
        axes.bar(at, values, 0.92 * width, yerr=errors, color=colour, label=model, error_kw=whisker)
    floors, dashes = [run.any_row(name).floor for name in names], (0, (4, 2))
    axes.hlines(floors, places - 0.45, places + 0.45, COLOURS["ink"], dashes, linewidth=1.5, label="floor")
    axes.set(ylabel="accuracy", xlim=(-0.6, len(names) - 0.4), ylim=(0, None))
    name_ticks(axes, names, (96 * figure.get_figwidth() - 80) / len(names))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")
    legend = (entries[1:] + entries[:1] for entries in axes.get_legend_handles_labels())  # the floor comes last
    figure.legend(*legend, loc="outside upper left", ncols=5, borderpad=0)
    return Picture(figure, f"Accuracy by benchmark: {', '.join(models)} and the floor", caption)


@styled
def _losses(folders: Mapping[str, Path], caption: str) -> Picture:
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
        axes.set(title=name, xlabel="step", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.05, y=0.12)
        axes.grid(axis="y")
    for axes in panels[len(folders) :]:
        axes.remove()
    figure.legend(handles=panels[0].get_lines(), loc="outside upper left", ncols=3, borderpad=0)
    return Picture(figure, "Training and held-out loss by benchmark", caption)
