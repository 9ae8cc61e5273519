"""The table of a run: accuracy of every model on every benchmark, what tuning gained, and recovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tailored_llama.config import DENSE, TUNED_DENSE
from tailored_llama.evaluation import HEALED, MEAN, MODELS, TAILORED, RecoveryRow, RecoveryTable
from tailored_llama.reports.diagnosis import Diagnosis, diagnosis_lines
from tailored_llama.reports.inputs import ReportInputs, RunResults, compared_rows
from tailored_llama.reports.parts import accuracy_of, megabytes, number, percent, share, share_cell, span
from tailored_llama.reports.tables import Cell, Column, Table, table_row
from tailored_llama.reports.text import floor_notes, plus_minus, run_name, size_sentence


def terminal_table(
    tables: Sequence[RecoveryTable], notes: Sequence[str], diagnoses: Sequence[Diagnosis], how: str
) -> Table:
    """The table for a terminal, with sizes, perplexities, notes and diagnoses below it."""
    lines = ["Accuracy ± standard error; recovery with its 95 % interval."]
    for table in tables:
        if size := size_sentence(table):
            lines.append(f"{run_name(table.ratio).capitalize()}. {size}" if len(tables) > 1 else size)
    return replace(accuracies(tables, how), notes=(*lines, *notes, *diagnosis_lines(diagnoses)))


def accuracies(tables: Sequence[RecoveryTable], how: str = "tuning", brief: bool = False) -> Table:
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
        rows += [table_row(run_name(table.ratio).capitalize())] if len(tables) > 1 else []
        for name in table.lines[-1:] if brief else table.lines:
            known, tailored = table.any_row(name), table.row(TAILORED, name)
            label = "mean" if name == MEAN else name
            cells = [Cell(label, (known.metric,) if known.metric else (), label)]
            cells += [Cell(number(known.examples, 0)), Cell(number(known.floor))]
            cells += [accuracy_of(table.row(model, name)) for model in MODELS]
            cells.append(share_cell(tailored.gain, tailored.gain_low, tailored.gain_high) if tailored else Cell("–"))
            cells += [*_recoveries(table, tailored), *(_beside(table.row(model, name)) for model in beside)]
            rows.append(table_row(*cells, bold=name == MEAN))
    return Table(columns, tuple(rows))


def _recoveries(table: RecoveryTable, row: RecoveryRow | None) -> list[Cell]:
    """The cells of recovery and chance-corrected recovery; that of a mean says over how many benchmarks it is."""
    if row is None:
        return [Cell("–"), Cell("–")]
    over = f"over {row.cc_benchmarks} of {len(table.benchmarks)}" if row.benchmark == MEAN else ""
    recovery = share_cell(row.recovery, row.recovery_low, row.recovery_high)
    return [recovery, share_cell(row.chance_corrected, row.cc_low, row.cc_high, over)]


def _beside(row: RecoveryRow | None) -> Cell:
    """An accuracy, below it the recovery with its interval and, of a file, its size."""
    if row is None:
        return Cell("–")
    recovery = "" if row.recovery is None else f"{percent(row.recovery)} of {DENSE}"
    size = "" if row.bytes is None else megabytes(row.bytes)
    under = (recovery, span(row.recovery_low, row.recovery_high), size)
    return replace(accuracy_of(row), under=tuple(filter(None, under)))


def report_notes(inputs: ReportInputs, runs: Sequence[tuple[RunResults, RecoveryTable]]) -> list[str]:
    """What to know of the accuracies: what the tuned dense model has, and where a recovery says little."""
    notes = floor_notes([table for _, table in runs])
    if not inputs.tuned_dense:
        return notes
    first, shares = runs[0][1], []
    tuned = [(name, row) for name in first.lines if (row := first.row(TUNED_DENSE, name)) and row.accuracy is not None]
    text = f"Dense, tuned on the same shots: {', '.join(f'{name} {plus_minus(row)}' for name, row in tuned)}."
    for run, _ in runs:
        tailored = {name: path for name, path in run.tailored.items() if name in inputs.tuned_dense}
        row = compared_rows(inputs, run, {DENSE: inputs.tuned_dense, TAILORED: tailored})[-1]
        if row.recovery is not None:
            named = f"{run_name(run.ratio)} " if len(runs) > 1 else ""
            shares.append(named + share(row.recovery, row.recovery_low, row.recovery_high))
    return [f"{text} Tailored ÷ dense, tuned: {', '.join(shares)}." if shares else text, *notes]
