"""The table of a run: accuracy of every model on every benchmark, what tuning gained, and recovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import rich.table

from tailored_llama.config import DENSE, TUNED_DENSE
from tailored_llama.evaluation import (
    MEAN,
    MODELS,
    PRUNED,
    TAILORED,
    RecoveryRow,
    RecoveryTable,
    read_recovery,
    recovery_tables,
)
from tailored_llama.reports.diagnosis import diagnosis_lines, read_diagnoses
from tailored_llama.reports.parts import NO_DIFFERENCE, accuracy_of, number, percent, share_cell, speedup
from tailored_llama.reports.tables import Cell, Column, Row, Table, table_row, terminal
from tailored_llama.reports.text import benchmark_notes, kept_tokens, perplexities, run_name
from tailored_llama.reports.tuned_dense import read_tuned_dense, tuned_dense_notes


def recovery_table(folder: Path) -> rich.table.Table:
    """The table of a report's folder, 80 characters wide, with sizes, perplexities, notes and diagnoses below it."""
    tables = recovery_tables(*read_recovery(folder))
    sizes = [text for table in tables if (text := _sizes(table, named=len(tables) > 1))]
    notes = tuned_dense_notes(read_tuned_dense(folder)) + benchmark_notes(tables)
    legend = "Accuracy ± standard error; recovery with its 95 % interval."
    notes = [legend, *sizes, *notes, *diagnosis_lines(read_diagnoses(folder))]
    return terminal(replace(accuracies(tables), notes=tuple(notes)))


def accuracies(tables: Sequence[RecoveryTable], how: str = "tuning") -> Table:
    """Every benchmark of every run; `how` are the steps from the pruned to the tailored model."""
    columns = (
        Column("benchmark", left=True),
        Column("examples", wide=True),
        Column("floor", wide=True),
        *(Column(model, swatch=model) for model in MODELS),
        Column(f"gained by\n{how}", wide=True),
        Column("recovery"),
        Column("chance-\ncorrected"),
    )
    rows = []
    for table in tables:
        rows += [table_row(run_name(table.ratio).capitalize())] if len(tables) > 1 else []
        for name in table.lines:
            rows.append(_row(table, name, _label(table, name)))
    return Table(columns, tuple(rows))


def mean_accuracies(tables: Sequence[RecoveryTable], how: str) -> Table:
    """As `accuracies`, with one row for each run: its mean, or its only benchmark."""
    rows = tuple(_row(table, table.lines[-1], Cell(run_name(table.ratio))) for table in tables)
    return replace(accuracies([], how), rows=rows)


def against_dense(tables: Sequence[RecoveryTable]) -> Table:
    """The tailored model of every run beside the tuned dense one."""
    columns = [Column("benchmark", left=True), Column(TUNED_DENSE), Column(TAILORED, swatch=TAILORED)]
    columns += [Column("tailored ÷\ndense, tuned"), Column("chance-\ncorrected")]
    rows = []
    for table in tables:
        rows += [table_row(run_name(table.ratio).capitalize())] if len(tables) > 1 else []
        for name in table.lines:
            dense, tailored = table.row(TUNED_DENSE, name), table.row(TAILORED, name)
            cells = [accuracy_of(dense), accuracy_of(tailored), *_recoveries(table, tailored)]
            rows.append(table_row(_label(table, name).text, *cells, bold=name == MEAN))
    return Table(tuple(columns), tuple(rows))


def _row(table: RecoveryTable, name: str, label: Cell) -> Row:
    known, tailored = table.any_row(name), table.row(TAILORED, name)
    gained = share_cell(tailored.gain, tailored.gain_low, tailored.gain_high) if tailored else Cell("–")
    models = [accuracy_of(table.row(model, name)) for model in MODELS]
    about = [number(known.examples, 0), number(known.floor)]
    return table_row(label, *about, *models, gained, *_recoveries(table, tailored), bold=name == MEAN)


def _label(table: RecoveryTable, name: str) -> Cell:
    """The name of a benchmark, and its metric below it."""
    metric = table.any_row(name).metric
    shown = "mean" if name == MEAN else name
    return Cell(shown, (metric,) if metric else (), shown)


def _recoveries(table: RecoveryTable, one: RecoveryRow | None) -> list[Cell]:
    """The cells of recovery and chance-corrected recovery; that of a mean says over how many benchmarks it is."""
    if one is None:
        return [Cell("–"), Cell("–")]
    over = f"over {one.cc_benchmarks} of {len(table.benchmarks)}" if one.benchmark == MEAN else ""
    recovery = share_cell(one.recovery, one.recovery_low, one.recovery_high)
    return [recovery, share_cell(one.chance_corrected, one.cc_low, one.cc_high, over)]


def _sizes(table: RecoveryTable, named: bool) -> str:
    """Parameters and perplexity, before → after, as far as they are known."""
    dense, pruned = table.size(DENSE), table.size(PRUNED)
    parts = []
    if dense.parameters:
        after = f" → {pruned.parameters:,}" if pruned.parameters else ""
        if pruned.parameters and dense.body and pruned.body:
            shares = 1 - pruned.parameters / dense.parameters, 1 - pruned.body / dense.body
            after += f" (−{percent(shares[0])}; −{percent(shares[1])} outside the embeddings)"
        parts.append(f"parameters {dense.parameters:,}{after}")
    if tokens := kept_tokens(table):
        parts.append(tokens)
    measure, (before, after, mended) = perplexities(table)
    if before:
        steps = [before, *filter(None, [after]), *([f"{mended} (healed)"] if mended else [])]
        parts.append(f"{measure} {' → '.join(steps)}")
    if (reading := speedup(pruned, "prefill")) and (writing := speedup(pruned, "decode")):
        same = reading == writing == NO_DIFFERENCE
        parts.append(f"speed: {reading}" if same else f"speed of reading: {reading}, of writing: {writing}")
    text = "; ".join(parts)
    return f"{run_name(table.ratio)}: {text}" if text and named else text[:1].upper() + text[1:]
