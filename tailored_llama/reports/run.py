"""The report of a run: a table, a self-contained HTML page, and a Markdown summary.

Only the scores are required; the report leaves out what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tailored_llama.config import DENSE, TUNED_DENSE
from tailored_llama.evaluation import HEALED, MEAN, MODELS, TAILORED, ModelRow, RecoveryRow, RecoveryTable
from tailored_llama.reports import text
from tailored_llama.reports.diagnosis import Diagnosis, by_signature, diagnose, diagnosis_lines
from tailored_llama.reports.figures import Picture
from tailored_llama.reports.inputs import ReportInputs, RunResults, compared_rows, scored_runs
from tailored_llama.reports.pages import settings_of, write_page
from tailored_llama.reports.parts import accuracy_of, megabytes, number, percent, share, share_cell, span
from tailored_llama.reports.profile import speed_table
from tailored_llama.reports.run_plots import picture_name, report_pictures
from tailored_llama.reports.tables import Cell, Column, Table, store_table, table_row
from tailored_llama.store import write_rows
from tailored_llama.training import is_better

_MARKDOWN_BYTES = 20_000  # of a Prefect artifact without its pictures


def write_report(inputs: ReportInputs, *, out: Path) -> None:
    """Stage: write the tables, `report.html`, and Markdown pages with PNG files into an existing folder.

    The tables are `recovery.parquet` (`RecoveryRow`; every ratio repeats the dense models' rows), `models.parquet`
    (`ModelRow`), `diagnoses.parquet` (`Diagnosis`: what went wrong) and `table.json`, for a terminal. `report.md` has
    the table and the accuracies, `plots.md` the other pictures.

    Raises:
        InputError: scores of a benchmark have different examples or metrics, or a file is missing or broken.
    """
    runs = scored_runs(inputs)
    sizes = {(row.ratio, row.model): row for _, table in runs for row in table.models.values()}
    write_rows(out / "recovery.parquet", [row for _, table in runs for row in table.rows], RecoveryRow)
    write_rows(out / "models.parquet", list(sizes.values()), ModelRow)
    diagnoses = [one for run, table in runs for one in diagnose(run, table, inputs.config)]
    write_rows(out / "diagnoses.parquet", diagnoses, Diagnosis)
    pictures, notes = report_pictures(runs), report_notes(inputs, runs)
    tables, how = [table for _, table in runs], text.gained_by(inputs.config)
    store_table(terminal_table(tables, notes, diagnoses, how), out)
    context = {
        "title": text.title(inputs),
        "accuracies": accuracies(tables, how),
        "how": how,
        "variant": text.VARIANTS[inputs.config.tuning.variant] if inputs.config else "an adapter",
        "inputs": inputs,
        "missing": [f"Incomplete: {name} failed: {error}" for name, error in inputs.failed.items()],
        "diagnoses": by_signature(diagnoses),
        "diagnosed": diagnosis_lines(diagnoses),
        "is_better": is_better,
        "config": inputs.config,
        "runs": [_shown(run, table, inputs, pictures) for run, table in runs],
        "dense": tables[0].size(DENSE),
        "speeds": _speeds([run for run, _ in runs]),
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
    pruned = [replace(row, checkpoint=text.run_name(run.ratio)) for run in runs if (row := run.speed())]
    dense = [row for run in runs if (row := run.speed("against"))]
    return speed_table([*dense[:1], *pruned], DENSE) if pruned else None


def _shown(
    run: RunResults, table: RecoveryTable, inputs: ReportInputs, pictures: Mapping[str, Picture]
) -> dict[str, Any]:
    """What the templates show of one run."""
    kinds = ("accuracy", "split", "losses")
    return {
        "name": text.run_name(table.ratio),
        "table": table,
        "compared": {name: found for name in run.logs if (found := run.comparison(name))},
        "summary": text.summary(table, inputs.config),
        "accuracy_name": picture_name("accuracy", run.ratio),
        **{kind: pictures.get(picture_name(kind, run.ratio)) for kind in kinds},
    }


def terminal_table(
    tables: Sequence[RecoveryTable], notes: Sequence[str], diagnoses: Sequence[Diagnosis], how: str
) -> Table:
    """The table for a terminal, with sizes, perplexities, notes and diagnoses below it."""
    lines = ["Accuracy ± standard error; recovery with its 95 % interval."]
    for table in tables:
        if size := text.size_sentence(table):
            lines.append(f"{text.run_name(table.ratio).capitalize()}. {size}" if len(tables) > 1 else size)
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
        rows += [table_row(text.run_name(table.ratio).capitalize())] if len(tables) > 1 else []
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
    notes = text.floor_notes([table for _, table in runs])
    if not inputs.tuned_dense:
        return notes
    first, shares = runs[0][1], []
    tuned = [(name, row) for name in first.lines if (row := first.row(TUNED_DENSE, name)) and row.accuracy is not None]
    told = f"Dense, tuned on the same shots: {', '.join(f'{name} {accuracy_of(row).text}' for name, row in tuned)}."
    for run, _ in runs:
        tailored = {name: path for name, path in run.tailored.items() if name in inputs.tuned_dense}
        row = compared_rows(inputs, run, {DENSE: inputs.tuned_dense, TAILORED: tailored})[-1]
        if row.recovery is not None:
            named = f"{text.run_name(run.ratio)} " if len(runs) > 1 else ""
            shares.append(named + share(row.recovery, row.recovery_low, row.recovery_high))
    return [f"{told} Tailored ÷ dense, tuned: {', '.join(shares)}." if shares else told, *notes]
