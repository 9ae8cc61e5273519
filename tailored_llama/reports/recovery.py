"""The tables of a run: accuracy of every model on every benchmark, what tuning gained, and recovery.

If the dense model was tuned on the same shots, its own table shows what pruning costs after tailoring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import rich.table

from tailored_llama.config import DENSE, TUNED_DENSE
from tailored_llama.evaluation import MEAN, MODELS, TAILORED, RecoveryRow, RecoveryTable, read_recovery, recovery_tables
from tailored_llama.reports.diagnosis import diagnosis_lines, read_diagnoses
from tailored_llama.reports.inputs import ReportInputs, compared_rows
from tailored_llama.reports.parts import accuracy_of, number, share, share_cell
from tailored_llama.reports.tables import Cell, Column, Row, Table, table_row, terminal
from tailored_llama.reports.text import benchmark_notes, plus_minus, run_name, size_sentence
from tailored_llama.store import read_rows


def recovery_table(folder: Path) -> rich.table.Table:
    """The table of a report's folder, 80 characters wide, with sizes, perplexities, notes and diagnoses below it."""
    tables = recovery_tables(*read_recovery(folder))
    notes = ["Accuracy ± standard error; recovery with its 95 % interval."]
    for table in tables:
        if size := size_sentence(table):
            notes.append(f"{run_name(table.ratio).capitalize()}. {size}" if len(tables) > 1 else size)
    notes += tuned_dense_notes(read_tuned_dense(folder)) + benchmark_notes(tables)
    notes += diagnosis_lines(read_diagnoses(folder))
    return terminal(replace(accuracies(tables), notes=tuple(notes)))


def accuracies(tables: Sequence[RecoveryTable], how: str = "tuning", brief: bool = False) -> Table:
    """Every benchmark of every run; if `brief`, only their means.

    `how` are the steps from the pruned to the tailored model.
    """

    def cells(table: RecoveryTable, name: str) -> list[Cell]:
        known, tailored = table.any_row(name), table.row(TAILORED, name)
        gained = share_cell(tailored.gain, tailored.gain_low, tailored.gain_high) if tailored else Cell("–")
        about = [Cell(number(known.examples, 0)), Cell(number(known.floor))]
        models = [accuracy_of(table.row(model, name)) for model in MODELS]
        return [*about, *models, gained, *_recoveries(table, tailored)]

    columns = (
        Column("benchmark", left=True),
        Column("examples", wide=True),
        Column("floor", wide=True),
        *(Column(model, swatch=model) for model in MODELS),
        Column(f"gained by\n{how}", wide=True),
        Column("recovery"),
        Column("chance-\ncorrected"),
    )
    return Table(columns, _rows(tables, cells, brief))


def against_dense(tables: Sequence[RecoveryTable]) -> Table:
    """The tailored model of every run beside the tuned dense one."""

    def cells(table: RecoveryTable, name: str) -> list[Cell]:
        tailored = table.row(TAILORED, name)
        return [accuracy_of(table.row(TUNED_DENSE, name)), accuracy_of(tailored), *_recoveries(table, tailored)]

    columns = [Column("benchmark", left=True), Column(TUNED_DENSE), Column(TAILORED, swatch=TAILORED)]
    columns += [Column("tailored ÷\ndense, tuned"), Column("chance-\ncorrected")]
    return Table(tuple(columns), _rows(tables, cells))


def _rows(
    tables: Sequence[RecoveryTable], cells: Callable[[RecoveryTable, str], list[Cell]], brief: bool = False
) -> tuple[Row, ...]:
    """The rows of every run, below its name if there are several: benchmark and metric, then `cells`."""
    rows = []
    for table in tables:
        rows += [table_row(run_name(table.ratio).capitalize())] if len(tables) > 1 else []
        for name in table.lines[-1:] if brief else table.lines:
            metric, label = table.any_row(name).metric, "mean" if name == MEAN else name
            first = Cell(label, (metric,) if metric else (), label)
            rows.append(table_row(first, *cells(table, name), bold=name == MEAN))
    return tuple(rows)


def _recoveries(table: RecoveryTable, row: RecoveryRow | None) -> list[Cell]:
    """The cells of recovery and chance-corrected recovery; that of a mean says over how many benchmarks it is."""
    if row is None:
        return [Cell("–"), Cell("–")]
    over = f"over {row.cc_benchmarks} of {len(table.benchmarks)}" if row.benchmark == MEAN else ""
    recovery = share_cell(row.recovery, row.recovery_low, row.recovery_high)
    return [recovery, share_cell(row.chance_corrected, row.cc_low, row.cc_high, over)]


def against_tuned_dense(inputs: ReportInputs) -> list[RecoveryTable]:
    """For each ratio, the tuned dense model and the tailored one, whose recovery is relative to the tuned dense model.

    Raises:
        InputError: scores of a benchmark have different examples or metrics, or a file is missing or broken.
    """
    rows: list[RecoveryRow] = []
    for run in inputs.runs if inputs.tuned_dense else ():
        tailored = {name: path for name, path in run.tailored.items() if name in inputs.tuned_dense}
        folders = {DENSE: inputs.tuned_dense, TAILORED: tailored}
        rows += compared_rows(inputs, run, folders)
    return recovery_tables([replace(row, model=TUNED_DENSE) if row.model == DENSE else row for row in rows], [])


def read_tuned_dense(report: Path) -> list[RecoveryTable]:
    """The tables of a report's `tuned_dense.parquet`; none without it.

    Raises:
        InputError: it is broken or of another schema.
    """
    file = report / "tuned_dense.parquet"
    return recovery_tables(read_rows(file, RecoveryRow), []) if file.is_file() else []


def tuned_dense_notes(tables: Sequence[RecoveryTable]) -> list[str]:
    """A sentence on the tuned dense model's accuracy, and on what share of it the tailored model of each ratio has."""
    if not tables:
        return []
    tuned = {name: plus_minus(row) for name in tables[0].lines if (row := tables[0].row(TUNED_DENSE, name))}
    text = f"Dense, tuned on the same shots: {', '.join(f'{name} {shown}' for name, shown in tuned.items())}."
    shares = []
    for table in tables:
        if (row := table.overall(TAILORED)) and row.recovery is not None:
            named = f"{run_name(table.ratio)} " if len(tables) > 1 else ""
            shares.append(named + share(row.recovery, row.recovery_low, row.recovery_high))
    return [f"{text} Tailored ÷ dense, tuned: {', '.join(shares)}." if shares else text]
