"""The report: what was kept and what was lost, as a table, a page that stands alone, and a Markdown summary.

Everything beside the scores may be absent; the report then says less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from tailored_llama.artifacts import write_table
from tailored_llama.pictures import COLOURS, Picture
from tailored_llama.recovery import MEAN, MODELS, RECOVERY_SCHEMA, PrunedRun, ReportInputs, Row, by_run, scored_runs
from tailored_llama.report_parts import first_sample, number, page_template, percent, settings_of, share, span
from tailored_llama.report_plots import markdown_picture, picture_name, plots_page, report_pictures
from tailored_llama.report_text import VARIANTS, benchmark_notes, gained_by, plus_minus, run_name, summary, title
from tailored_llama.statistics import RESAMPLES

_MARKDOWN_BYTES = 20_000


def write_report(inputs: ReportInputs, out: Path) -> None:
    """Stage: write `recovery.parquet`, `report.html`, and Markdown pages with PNG files into an existing folder.

    `report.md` has the table and the accuracies, `plots.md` the other pictures.

    Raises:
        InputError: scores to be compared are of different examples or metrics, or a file is missing or broken.
    """
    runs = scored_runs(inputs)
    rows = [row for _, found in runs for row in found]
    columns = {name: [getattr(row, name) for row in rows] for name in RECOVERY_SCHEMA.names}
    write_table(out / "recovery.parquet", columns, RECOVERY_SCHEMA)
    pictures = report_pictures(inputs, runs)
    (out / "report.html").write_text(_page(inputs, runs, pictures), encoding="utf-8")
    (out / "report.md").write_text(_markdown(inputs, [found for _, found in runs], pictures), encoding="utf-8")
    (out / "plots.md").write_text(plots_page(inputs, pictures), encoding="utf-8")
    for name, picture in pictures.items():
        picture.save_png(out / f"{name}.png")


def console_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal of 80 characters; parameters, perplexities and what to mind stand below it."""
    runs = by_run(rows)
    notes = [text for run in runs if (text := _sizes(run[-1], named=len(runs) > 1))] + benchmark_notes(rows)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left", caption_style="none")
    table.caption = escape("\n".join(["Accuracy ± standard error; recovery with its 95 % interval.", *notes]))
    table.add_column("benchmark", overflow="fold")
    for name in (*MODELS, "recovery", "chance-corrected"):
        table.add_column(name, justify="right")
    for run in runs:
        if len(runs) > 1:
            table.add_row(f"[bold]{run_name(run[0])}[/]")
        for row in run:
            cells = [row.benchmark, *(plus_minus(row, model).replace(" ± 0", "±") for model in MODELS)]
            cells.append(share(row.recovery, row.recovery_low, row.recovery_high, 0))
            cells.append(share(row.chance_corrected, row.cc_low, row.cc_high, 0))
            table.add_row(*map(escape, cells), style="bold" if row.benchmark == MEAN else None)
        table.add_section()
    return table


def _sizes(row: Row, named: bool) -> str:
    """Parameters and perplexity, before → after, as far as known."""
    parts = []
    if row.dense_parameters:
        after = f" → {row.pruned_parameters:,}" if row.pruned_parameters else ""
        parts.append(f"parameters {row.dense_parameters:,}{after}")
    if row.dense_perplexity is not None:
        after = f" → {number(row.pruned_perplexity, 1)}" if row.pruned_perplexity is not None else ""
        healed = f" → {number(row.healed_perplexity, 1)} (healed)" if row.healed_perplexity else ""
        parts.append(f"perplexity {number(row.dense_perplexity, 1)}{after}{healed}")
    if row.prefill_speedup and row.decode_speedup:
        parts.append(f"speed ×{row.prefill_speedup:.2f} reading, ×{row.decode_speedup:.2f} writing")
    text = "; ".join(parts)
    return f"{run_name(row)}: {text}" if text and named else text[:1].upper() + text[1:]


def _markdown(inputs: ReportInputs, runs: Sequence[Sequence[Row]], pictures: Mapping[str, Picture]) -> str:
    """Summary, tables, accuracies; where tables would be too long for a Prefect artifact, one table of the means."""
    model = inputs.model.replace("`", "'")  # in a code span nothing is markup, and the name cannot end it
    head = [f"# `{model}`{title(inputs).removeprefix(inputs.model)}", ""]
    texts, tables = [], []
    for run in runs:
        texts += [f"**{run_name(run[0]).capitalize()}.** " * (len(runs) > 1) + summary(inputs, run), ""]
        tables += _markdown_table(run_name(run[0]), [(row.benchmark, row) for row in run])
    notes = [line for note in benchmark_notes([row for run in runs for row in run]) for line in (note, "")]
    if len("\n".join([*head, *texts, *notes, *tables]).encode()) > _MARKDOWN_BYTES - 1_000:
        texts, tables = [], _markdown_table("mean", [(run_name(run[0]), run[-1]) for run in runs])
    how = gained_by(inputs.config)
    legend = (
        f"Accuracy ± standard error. With 95 % intervals: gained = tailored − pruned, by {how}; recovery = tailored ÷ "
        "dense; chance-corrected recovery = (tailored − floor) ÷ (dense − floor), where dense is significantly above "
        "its floor."
    )
    shown = [(picture_name("accuracy", run[0].ratio), f"Accuracy at {run_name(run[0])}:") for run in runs]
    bars = [line for name, text in shown for line in (text, "", markdown_picture(name, pictures[name]), "")]
    return "\n".join([*head, *texts, *notes, *tables, legend, "", *bars])


def _markdown_table(name: str, rows: Sequence[tuple[str, Row]]) -> list[str]:
    """Narrow enough for Prefect's page: bounds in whole percent, and no line ends within ± or bounds."""
    names = [name, "examples", "floor", *MODELS, "gained", "recovery", "chance-corrected"]
    lines = [f"| {' | '.join(names)} |", "|:--|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for label, row in rows:
        cells = [f"{label} ({row.metric})" if row.metric else label, f"{row.examples:,}", number(row.floor)]
        cells += [plus_minus(row, model).replace("± ", "±\N{NO-BREAK SPACE}") for model in MODELS]
        for value, bounds in (
            (row.gain, span(row.gain_low, row.gain_high, 0)),
            (row.recovery, span(row.recovery_low, row.recovery_high, 0)),
            (row.chance_corrected, span(row.cc_low, row.cc_high, 0)),
        ):
            bounds = bounds.replace("–", " to ").replace(" ", "\N{NO-BREAK SPACE}")
            cells.append(f"{percent(value)} ({bounds})" if bounds else percent(value))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _page(inputs: ReportInputs, runs: Sequence[tuple[PrunedRun, list[Row]]], pictures: Mapping[str, Picture]) -> str:
    return page_template("report.html.j2").render(
        title=title(inputs),
        gained_by=gained_by(inputs.config),
        variant=VARIANTS[inputs.config.tuning.variant] if inputs.config else "an adapter",
        inputs=inputs,
        config=inputs.config,
        runs=[
            {
                "name": run_name(rows[0]),
                "rows": rows,
                "last": rows[-1],
                "speed": run.speed(),
                "dense_speed": run.speed("against"),
                "summary": summary(inputs, rows),
                **{what: pictures.get(picture_name(what, run.ratio)) for what in ("accuracy", "widths", "losses")},
            }
            for run, rows in runs
        ],
        notes=benchmark_notes([row for _, rows in runs for row in rows]),
        importance=pictures.get("importance"),
        prompts={name: first_sample(folder / "samples.txt") for name, folder in inputs.prompts.items()},
        settings=settings_of(inputs.config) if inputs.config else {},
        colours=COLOURS,
        resamples=RESAMPLES,
        mean=MEAN,
    )
