"""The report of a run: a table, a self-contained HTML page, and a Markdown summary.

Only the scores are required; the report leaves out what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tailored_llama.config import DENSE
from tailored_llama.evaluation import ModelRow, RecoveryRow, RecoveryTable
from tailored_llama.reports.diagnosis import Diagnosis, by_signature, diagnose, diagnosis_lines
from tailored_llama.reports.figures import Picture
from tailored_llama.reports.inputs import ReportInputs, RunResults, scored_runs
from tailored_llama.reports.pages import settings_of, write_page
from tailored_llama.reports.profile import speed_table
from tailored_llama.reports.recovery import accuracies, report_notes, terminal_table
from tailored_llama.reports.run_plots import picture_name, report_pictures
from tailored_llama.reports.tables import Table, store_table
from tailored_llama.reports.text import VARIANTS, gained_by, run_name, summary, title
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
    tables, how = [table for _, table in runs], gained_by(inputs.config)
    store_table(terminal_table(tables, notes, diagnoses, how), out)
    context = {
        "title": title(inputs),
        "accuracies": accuracies(tables, how),
        "how": how,
        "variant": VARIANTS[inputs.config.tuning.variant] if inputs.config else "an adapter",
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
    pruned = [replace(row, checkpoint=run_name(run.ratio)) for run in runs if (row := run.speed())]
    dense = [row for run in runs if (row := run.speed("against"))]
    return speed_table([*dense[:1], *pruned], DENSE) if pruned else None


def _shown(
    run: RunResults, table: RecoveryTable, inputs: ReportInputs, pictures: Mapping[str, Picture]
) -> dict[str, Any]:
    """What the templates show of one run."""
    kinds = ("accuracy", "split", "losses")
    return {
        "name": run_name(table.ratio),
        "table": table,
        "compared": {name: found for name in run.logs if (found := run.comparison(name))},
        "summary": summary(table, inputs.config),
        "accuracy_name": picture_name("accuracy", run.ratio),
        **{kind: pictures.get(picture_name(kind, run.ratio)) for kind in kinds},
    }
