"""The report of a run: a table, a self-contained HTML page, and a Markdown summary.

Only the scores are required; the report leaves out what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tailored_llama.config import DENSE
from tailored_llama.evaluation import RESAMPLES, BitsRow, ModelRow, RecoveryRow, RecoveryTable
from tailored_llama.reports.bits import bits_picture, bits_sentences, fewer_bits
from tailored_llama.reports.diagnosis import FILE, Diagnosis, by_signature, diagnose, diagnosis_lines
from tailored_llama.reports.figures import Picture
from tailored_llama.reports.inputs import ReportInputs, RunResults, scored_runs
from tailored_llama.reports.pages import (
    as_code,
    first_sample,
    markdown_page,
    markdown_picture,
    page_template,
    settings_of,
)
from tailored_llama.reports.recovery import accuracies, against_dense
from tailored_llama.reports.run_plots import picture_name, plots_page, report_pictures
from tailored_llama.reports.tables import markdown
from tailored_llama.reports.text import VARIANTS, benchmark_notes, gained_by, missing_notes, run_name, summary, title
from tailored_llama.reports.tuned_dense import FILE as TUNED_DENSE_FILE
from tailored_llama.reports.tuned_dense import against_tuned_dense, tuned_dense_notes
from tailored_llama.store import write_rows
from tailored_llama.training import is_better

STAGE, VERSION = "report", 11

_MARKDOWN_BYTES = 20_000

Runs = Sequence[tuple[RunResults, RecoveryTable]]


def write_report(inputs: ReportInputs, *, out: Path) -> None:
    """Stage: write the tables, `report.html`, and Markdown pages with PNG files into an existing folder.

    The tables are `recovery.parquet` (`RecoveryRow`; every ratio repeats the dense model's rows), `models.parquet`
    (`ModelRow`), `diagnoses.parquet` (`Diagnosis`: what went wrong) and, if types of fewer bits were scored,
    `bits.parquet` (`BitsRow`). If the dense model was tuned, `tuned_dense.parquet` (`RecoveryRow`) has it and the
    tailored models, whose recovery is relative to it there. `report.md` has the table and the accuracies, `plots.md`
    the other pictures.

    Raises:
        InputError: scores of a benchmark have different examples or metrics, or a file is missing or broken.
    """
    runs = scored_runs(inputs)
    sizes = {(row.ratio, row.model): row for _, table in runs for row in table.models.values()}
    write_rows(out / "recovery.parquet", [row for _, table in runs for row in table.rows], RecoveryRow)
    write_rows(out / "models.parquet", list(sizes.values()), ModelRow)
    diagnoses = [one for run, table in runs for one in diagnose(run, table, inputs.config)]
    write_rows(out / FILE, diagnoses, Diagnosis)
    if against := against_tuned_dense(inputs):
        write_rows(out / TUNED_DENSE_FILE, [row for table in against for row in table.rows], RecoveryRow)
    pictures, tables, bits = report_pictures(inputs, runs, against), [table for _, table in runs], fewer_bits(inputs)
    if bits:
        write_rows(out / "bits.parquet", bits, BitsRow)
        pictures["bits"] = bits_picture(bits)
    (out / "report.html").write_text(_page(inputs, runs, against, diagnoses, pictures, bits), encoding="utf-8")
    (out / "report.md").write_text(_markdown(inputs, tables, against, diagnoses, pictures), encoding="utf-8")
    (out / "plots.md").write_text(plots_page(inputs, pictures, " ".join(bits_sentences(bits))), encoding="utf-8")
    for name, picture in pictures.items():
        picture.save_png(out / f"{name}.png")


def _markdown(
    inputs: ReportInputs,
    tables: Sequence[RecoveryTable],
    against: Sequence[RecoveryTable],
    diagnoses: Sequence[Diagnosis],
    pictures: Mapping[str, Picture],
) -> str:
    """Summary, tables, diagnoses and accuracies; if too long for a Prefect artifact, means and names instead."""
    head = [f"# {as_code(inputs.model)}{title(inputs).removeprefix(inputs.model)}", *missing_notes(inputs)]
    notes, how = tuned_dense_notes(against) + benchmark_notes(tables), gained_by(inputs.config)
    legend = (
        f"Accuracy ± standard error. With 95 % intervals: gained = tailored − pruned, by {how}; recovery = tailored ÷ "
        "dense; chance-corrected recovery = (tailored − floor) ÷ (dense − floor), where dense is significantly above "
        "its floor."
    )
    named = [f"**{run_name(table.ratio).capitalize()}.** " * (len(tables) > 1) for table in tables]
    texts = [name + summary(table, inputs.config) for name, table in zip(named, tables, strict=True)]
    parts = [*head, *texts, *notes, markdown(accuracies(tables, how)), legend, *_diagnosed(diagnoses)]
    if len(markdown_page(*parts).encode()) > _MARKDOWN_BYTES - 1_000:
        parts = [*head, *notes, markdown(accuracies(tables, how, brief=True)), legend]
        parts += _diagnosed(diagnoses, brief=True)
    for table in tables:
        name = picture_name("accuracy", table.ratio)
        parts += [f"Accuracy at {run_name(table.ratio)}:", markdown_picture(name, pictures[name])]
    return markdown_page(*parts)


def _diagnosed(diagnoses: Sequence[Diagnosis], brief: bool = False) -> list[str]:
    """The diagnoses as a list under a heading; nothing without any."""
    lines = [f"- {line}" for line in diagnosis_lines(diagnoses, brief)]
    return ["## What went wrong, and what to try", "\n".join(lines)] if lines else []


def _page(
    inputs: ReportInputs,
    runs: Runs,
    against: Sequence[RecoveryTable],
    diagnoses: Sequence[Diagnosis],
    pictures: Mapping[str, Picture],
    bits: Sequence[BitsRow],
) -> str:
    return page_template("run.html.j2").render(
        title=title(inputs),
        accuracies=accuracies([table for _, table in runs], gained_by(inputs.config)),
        variant=VARIANTS[inputs.config.tuning.variant] if inputs.config else "an adapter",
        inputs=inputs,
        missing=missing_notes(inputs),
        diagnoses=by_signature(diagnoses),
        is_better=is_better,
        config=inputs.config,
        runs=[
            {
                "name": run_name(table.ratio),
                "table": table,
                "speed": run.speed(),
                "dense_speed": run.speed("against"),
                "pieces": run.pieces,
                "compared": {name: found for name in run.logs if (found := run.comparison(name))},
                "summary": summary(table, inputs.config),
                **{kind: pictures.get(picture_name(kind, run.ratio)) for kind in ("accuracy", "widths", "losses")},
            }
            for run, table in runs
        ],
        dense=runs[0][1].size(DENSE),
        notes=benchmark_notes([table for _, table in runs]),
        against=against_dense(against) if against else None,
        against_notes=tuned_dense_notes(against),
        importance=pictures.get("importance"),
        bits=bits,
        bits_picture=pictures.get("bits"),
        bits_sentences=bits_sentences(bits),
        prompts={name: first_sample(folder / "samples.txt") for name, folder in inputs.prompts.items()},
        settings=settings_of(inputs.config) if inputs.config else {},
        resamples=RESAMPLES,
    )
