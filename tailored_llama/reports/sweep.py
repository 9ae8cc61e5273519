"""The report of a sweep: tables of all of its settings."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tailored_llama.config import RATIOS, SWEEP_FIELDS, TUNED_DENSE, SweepConfig, sweep_cells
from tailored_llama.evaluation import RecoveryRow, SweepRow
from tailored_llama.reports.pages import Report, Section, settings_of, write_pages
from tailored_llama.reports.parts import accuracy_cell, number, percent, share_cell, span
from tailored_llama.reports.tables import Cell, Column, Row, Table, table_row
from tailored_llama.store import write_rows

_LEGEND = (
    "Recovery: accuracy ÷ the dense model's on the same examples and prompts, mean over all benchmarks, including "
    "those where dense is at its floor. Chance-corrected: only the accuracy above the floor, over the benchmarks where "
    "dense is significantly above it."
)


def write_sweep(config: SweepConfig, measured: Sequence[tuple[SweepRow, Sequence[RecoveryRow]]], *, out: Path) -> None:
    """Stage: write the pages, `sweep.parquet` and `benchmarks.parquet`; dense models come first."""
    rows = [row for row, _ in measured]
    write_rows(out / "sweep.parquet", rows, SweepRow)
    write_rows(out / "benchmarks.parquet", [row for _, by_benchmark in measured for row in by_benchmark], RecoveryRow)
    settings = settings_of(config, [] if config.tailored else ["tuning"])
    for field in (*SWEEP_FIELDS, RATIOS, *(field for table in config.grid for field in table)):
        section, _, name = field.rpartition(".")
        settings.get(section, {}).pop(name, None)  # the page shows what all cells share
    models = ", ".join(dict.fromkeys(cell.run.model.source for cell in sweep_cells(config)))
    errors = [f"{row.label} at {percent(row.ratio)} failed: {row.error}" for row in rows if row.error]
    report = Report(
        f"Sweep of {models}{' (incomplete)' if errors else ''}",
        [_summary(rows)],
        errors,
        [
            Section("Every setting", table=_table(rows)),
            Section("Benchmark by benchmark", table=_by_benchmark(measured)),
        ],
        settings,
    )
    write_pages(report, "sweep", out, rows=rows)


def _table(rows: Sequence[SweepRow]) -> Table:
    """A row for every setting; recoveries, which are the last two columns, only if any cell was scored."""
    recovered = any(row.recovery is not None for row in rows if row.ratio)
    columns = (
        Column("setting", left=True),
        Column("removed /\nof the body"),
        Column("parameters", wide=True),
        Column("perplexity", wide=recovered),
        Column("perplexity\n÷ dense"),
        Column("mean\naccuracy"),
        Column("recovery"),
        Column("chance-\ncorrected"),
    )
    shown = len(columns) if recovered else len(columns) - 2
    cut = tuple(replace(row, cells=row.cells[:shown]) for row in map(_row, rows))
    return Table(columns[:shown], cut, (_LEGEND,) if recovered else ())


def _row(row: SweepRow) -> Row:
    if row.error:
        return table_row(row.label, percent(row.ratio), f"failed: {row.error}")
    seeds, extremes, over = "", "", f"over {row.cc_benchmarks}"
    if row.seeds > 1:
        seeds = f"seeds {span(row.recovery_least, row.recovery_most)}"
        extremes = f"{number(row.perplexity_least, 2)}–{number(row.perplexity_most, 2)}"
    shares = [
        share_cell(row.recovery, row.recovery_low, row.recovery_high, seeds, digits=1),
        share_cell(row.chance_corrected, row.cc_low, row.cc_high, over, digits=1),
    ]
    tuned = row.label == TUNED_DENSE or row.label.startswith(f"{TUNED_DENSE}, ")
    if not row.ratio and not tuned:  # the dense model, of which recoveries are shares
        shares = [Cell(percent(1.0, 0))] * 2
    return table_row(
        row.label,
        _removed(row),
        number(row.parameters, 0),
        Cell(number(row.perplexity, 2), (extremes,), number(row.perplexity, 2)),
        number(row.times_dense, 2),
        accuracy_cell(row.accuracy, row.accuracy_stderr),
        *shares,
        bold=not row.ratio,
    )


def _removed(row: SweepRow) -> Cell:
    """The share of all parameters that was removed, and below it that of the body."""
    if not row.ratio:
        return Cell("–")
    brief = f"{number(100 * row.removed, 1)} / {percent(row.removed_of_body)}"
    return Cell(percent(row.removed, 2), (percent(row.removed_of_body, 2),), brief)


def _by_benchmark(measured: Sequence[tuple[SweepRow, Sequence[RecoveryRow]]]) -> Table:
    scored = [(row, found) for row, found in measured if found]
    if not scored:
        return Table()
    first = scored[0][1]
    columns = [Column("setting", left=True), Column("removed /\nof the body")]
    rows = [table_row("floor", "–", *(number(score.floor) for score in first))]
    for row, found in scored:
        cells = [Cell(number(score.accuracy), (f"± {number(score.stderr)}",)) for score in found]
        rows.append(table_row(row.label, _removed(row), *cells, bold=not row.ratio))
    columns += [Column(score.benchmark, under=(str(score.metric),)) for score in first]
    return Table(tuple(columns), tuple(rows))


def _summary(rows: Sequence[SweepRow]) -> str:
    cells = [row for row in rows if row.ratio]
    done = [row for row in cells if not row.error]
    failed, seeds = len(cells) - len(done), {row.seeds for row in done}
    summary = f"{len(cells)} settings" + (f", of which {failed} failed" if failed else "")
    if max(seeds, default=1) > 1:
        summary += f", {'each with' if len(seeds) == 1 else 'with up to'} {max(seeds)} seeds"
    return f"{summary}."
