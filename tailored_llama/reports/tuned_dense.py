"""What pruning costs after tailoring: the part of a run's report on the dense model tuned on the same shots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tailored_llama.config import DENSE, TUNED_DENSE
from tailored_llama.evaluation import TAILORED, RecoveryRow, RecoveryTable, recovery_tables
from tailored_llama.reports.inputs import ReportInputs, compared_rows
from tailored_llama.reports.parts import share
from tailored_llama.reports.text import plus_minus, run_name
from tailored_llama.store import read_rows

FILE = "tuned_dense.parquet"


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
    file = report / FILE
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
