"""The report of a run: a table, a self-contained HTML page, and a Markdown summary.

Only the scores are required; the report leaves out what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tailored_llama.config import DENSE
from tailored_llama.evaluation import MEAN, MODELS, RESAMPLES, TAILORED, BitsRow, ModelRow, RecoveryRow, RecoveryTable
from tailored_llama.reports.bits import bits_picture, bits_sentences, fewer_bits
from tailored_llama.reports.diagnosis import FILE, Diagnosis, by_signature, diagnose, diagnosis_lines
from tailored_llama.reports.figures import Picture
from tailored_llama.reports.inputs import ReportInputs, RunResults, scored_runs
from tailored_llama.reports.parts import (
    first_sample,
    markdown_picture,
    number,
    page_template,
    percent,
    settings_of,
    span,
)
from tailored_llama.reports.run_plots import picture_name, plots_page, report_pictures
from tailored_llama.reports.text import (
    VARIANTS,
    benchmark_notes,
    gained_by,
    missing_notes,
    plus_minus,
    run_name,
    summary,
    title,
)
from tailored_llama.reports.tuned_dense import FILE as TUNED_DENSE_FILE
from tailored_llama.reports.tuned_dense import against_tuned_dense, tuned_dense_notes
from tailored_llama.store import write_rows
from tailored_llama.training import is_better

STAGE, VERSION = "report", 10

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
    model = inputs.model.replace("`", "'")  # keep the name in its code span, where nothing is markup
    head = [f"# `{model}`{title(inputs).removeprefix(inputs.model)}", ""]
    head += [line for note in missing_notes(inputs) for line in (note, "")]
    texts, cells = [], []
    for table in tables:
        name = run_name(table.ratio)
        texts += [f"**{name.capitalize()}.** " * (len(tables) > 1) + summary(table, inputs.config), ""]
        cells += _markdown_table(name, [(line, table, line) for line in table.lines])
    notes = [line for note in tuned_dense_notes(against) + benchmark_notes(tables) for line in (note, "")]
    wrong = _markdown_list(diagnosis_lines(diagnoses))
    if len("\n".join([*head, *texts, *notes, *cells, *wrong]).encode()) > _MARKDOWN_BYTES - 1_000:
        texts, cells = [], _markdown_table("mean", [(run_name(t.ratio), t, t.lines[-1]) for t in tables])
        wrong = _markdown_list(diagnosis_lines(diagnoses, brief=True))
    how = gained_by(inputs.config)
    legend = (
        f"Accuracy ± standard error. With 95 % intervals: gained = tailored − pruned, by {how}; recovery = tailored ÷ "
        "dense; chance-corrected recovery = (tailored − floor) ÷ (dense − floor), where dense is significantly above "
        "its floor."
    )
    shown = [(picture_name("accuracy", t.ratio), f"Accuracy at {run_name(t.ratio)}:") for t in tables]
    bars = [line for name, text in shown for line in (text, "", markdown_picture(name, pictures[name]), "")]
    return "\n".join([*head, *texts, *notes, *cells, legend, "", *wrong, *bars])


def _markdown_table(name: str, lines: Sequence[tuple[str, RecoveryTable, str]]) -> list[str]:
    """A table of (label, run, benchmark), narrow enough for Prefect's page: lines never break at ± or within bounds."""
    names = [name, "examples", "floor", *MODELS, "gained", "recovery", "chance-corrected"]
    text = [f"| {' | '.join(names)} |", "|:--|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for label, table, benchmark in lines:
        row, tailored = table.any_row(benchmark), table.row(TAILORED, benchmark)
        cells = [f"{label} ({row.metric})" if row.metric else label, f"{row.examples:,}", number(row.floor)]
        cells += [plus_minus(table.row(model, benchmark)).replace("± ", "±\N{NO-BREAK SPACE}") for model in MODELS]
        for field, bound in (("gain", "gain"), ("recovery", "recovery"), ("chance_corrected", "cc")):
            value, low, high = (getattr(tailored, key, None) for key in (field, f"{bound}_low", f"{bound}_high"))
            bounds = span(low, high, 0).replace("–", " to ").replace(" ", "\N{NO-BREAK SPACE}")
            cells.append(f"{percent(value)} ({bounds})" if bounds else percent(value))
        text.append(f"| {' | '.join(cells)} |")
    return [*text, ""]


def _markdown_list(lines: Sequence[str]) -> list[str]:
    """The diagnoses as a list under a heading; nothing without any."""
    return ["## What went wrong, and what to try", "", *(f"- {line}" for line in lines), ""] if lines else []


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
        gained_by=gained_by(inputs.config),
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
        against=[(run_name(table.ratio), table) for table in against],
        against_notes=tuned_dense_notes(against),
        importance=pictures.get("importance"),
        bits=bits,
        bits_picture=pictures.get("bits"),
        bits_sentences=bits_sentences(bits),
        prompts={name: first_sample(folder / "samples.txt") for name, folder in inputs.prompts.items()},
        settings=settings_of(inputs.config) if inputs.config else {},
        resamples=RESAMPLES,
        mean=MEAN,
    )
