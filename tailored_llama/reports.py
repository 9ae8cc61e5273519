"""The report: what was kept and what was lost, as a table, a page that stands alone, and a Markdown summary.

Everything beside the scores may be absent; the report then says less.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from rich import box
from rich.markup import escape
from rich.table import Table

from tailored_llama.artifacts import write_table
from tailored_llama.config import RunConfig
from tailored_llama.errors import InputError
from tailored_llama.pictures import COLOURS, Picture
from tailored_llama.recovery import MEAN, MODELS, RECOVERY_SCHEMA, PrunedRun, ReportInputs, Row, by_run, scored_runs
from tailored_llama.report_plots import markdown_picture, picture_name, plots_page, report_pictures
from tailored_llama.statistics import RESAMPLES

_MARKDOWN_BYTES = 20_000
_PROMPT_CHARACTERS = 3_000  # a prompt with many solved examples is cut in the middle


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


def number(value: float | None, digits: int = 3) -> str:
    """A number with a true minus sign and thousands separated; a dash for none, ∞ for what has no bound."""
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−").replace("inf", "∞")


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; a dash for none."""
    return "–" if value is None else f"{number(100 * value, digits)}\N{NO-BREAK SPACE}%"


def span(low: float | None, high: float | None, digits: int = 1) -> str:
    """A 95 % interval of a share, in percent; empty for none."""
    if low is None or high is None:
        return ""
    between = " to " if low < 0 else "–"
    return f"{number(100 * low, digits)}{between}{number(100 * high, digits)}\N{NO-BREAK SPACE}%"


def plus_minus(row: Row, model: str) -> str:
    """A model's accuracy ± its standard error."""
    value, error = getattr(row, model), getattr(row, f"{model}_stderr")
    return "–" if value is None else f"{number(value)} ± {number(error)}"


def run_name(row: Row) -> str:
    return "pruned" if row.ratio is None else f"ratio {row.ratio:g}"


def summary(inputs: ReportInputs, run: Sequence[Row]) -> str:
    """Two sentences on one run: what pruning did to the model, and what tuning brought back."""
    return " ".join(filter(None, (_size_sentence(run[-1]), _recovery_sentence(inputs, run))))


def _size_sentence(row: Row) -> str:
    parts = []
    if row.dense_parameters and row.pruned_parameters:
        removed = percent(1 - row.pruned_parameters / row.dense_parameters)
        parts.append(
            f"Pruning removed {removed} of all parameters ({row.dense_parameters:,} before, "
            f"{row.pruned_parameters:,} after)"
        )
    if row.dense_perplexity is not None and row.pruned_perplexity is not None:
        before, after = number(row.dense_perplexity, 1), number(row.pruned_perplexity, 1)
        healed = f", and by healing to {number(row.healed_perplexity, 1)}" if row.healed_perplexity else ""
        parts.append(f"{'p' if parts else 'P'}erplexity went from {before} to {after}{healed}")
    if row.prefill_speedup and row.decode_speedup:
        speed = f"{number(row.prefill_speedup, 2)} and {number(row.decode_speedup, 2)} times the dense model's"
        parts.append(f"{'i' if parts else 'I'}t reads and writes at {speed} speed")
    return f"{', and '.join([', '.join(parts[:-1]), *parts[-1:]] if parts[1:] else parts)}." if parts else ""


def _recovery_sentence(inputs: ReportInputs, run: Sequence[Row]) -> str:
    row, benchmarks = run[-1], [row for row in run if row.benchmark != MEAN]
    tuned = row.recovery is not None
    counted = [b for b in benchmarks if b.dense and (b.tailored if tuned else b.pruned) is not None]
    if not counted:
        return ""
    where = f"mean over {len(counted)} benchmarks" if len(counted) > 1 else counted[0].benchmark
    where += f", {sum(b.examples for b in counted):,} examples"
    untuned = [b.pruned / b.dense for b in counted if b.pruned is not None and b.dense]
    without = percent(float(np.mean(untuned))) if len(untuned) == len(counted) else ""
    if not tuned:
        return f"Without tuning, the pruned model reaches {without} of the dense model's accuracy ({where})."
    measured = [where, f"95 % interval {span(row.recovery_low, row.recovery_high)}"]
    measured += [f"{without} when only pruned"] if without else []
    text = f"{_made(inputs.config)} the pruned model reaches {percent(row.recovery)} of the dense model's accuracy "
    text += f"({'; '.join(measured)})"
    if row.chance_corrected is not None:
        which = f"over the {row.cc_benchmarks} of them where that is significant; " if len(counted) > 1 else ""
        text += f", and {percent(row.chance_corrected)} of what the dense model has above its floor "
        text += f"({which}{span(row.cc_low, row.cc_high)})"
    return text + "."


VARIANTS = {"lora": "a LoRA adapter", "rslora": "an rsLoRA adapter", "dora": "a DoRA adapter"}
VARIANTS |= {"prompt": "a tuned soft prompt", "prefix": "a tuned prefix"}


def _made(config: RunConfig | None) -> str:
    """What was done to a pruned model, as the start of a sentence."""
    if config is None:
        return "After tuning,"
    steps = [f"healing on {config.healing.tokens:,} tokens"] if config.healing.tokens else []
    tuning, what = config.tuning, VARIANTS[config.tuning.variant]
    if tuning.examples == "mixture":
        steps.append(f"tuning {what} for all benchmarks on {tuning.shots} examples")
    elif tuning.examples == "benchmark":
        steps.append(f"tuning {what} for each benchmark on {tuning.shots} examples")
    return f"After {' and '.join(steps)}," if steps else "Without tuning,"


def gained_by(config: RunConfig | None) -> str:
    """What lies between the pruned and the tailored model."""
    return "healing and tuning" if config and config.healing.tokens else "tuning"


def floor_notes(rows: Sequence[Row]) -> list[str]:
    """One sentence for each benchmark whose recovery says little, as dense itself is at its floor, or close to it."""
    notes: dict[str, str] = {}
    for row in rows:
        if row.dense is None or row.dense_above_floor is not False:
            continue
        if row.dense <= row.floor:
            said, gives = f"Dense itself is at the floor on {row.benchmark}", "nothing"
            against = f"{number(row.dense)} against {number(row.floor)}"
        else:
            said, gives = f"Dense is not significantly above the floor on {row.benchmark}", "little"
            against = f"{plus_minus(row, 'dense')} against {number(row.floor)}"
        notes[row.benchmark] = f"{said} ({against}): its recovery says {gives}."
    return list(notes.values())


def console_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal of 80 characters; parameters, perplexities and what to mind stand below it."""
    runs = by_run(rows)
    notes = [text for run in runs if (text := _sizes(run[-1], named=len(runs) > 1))] + floor_notes(rows)
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
            for value, low, high in (
                (row.recovery, row.recovery_low, row.recovery_high),
                (row.chance_corrected, row.cc_low, row.cc_high),
            ):
                bounds = span(low, high, 0).removesuffix("\N{NO-BREAK SPACE}%").replace(" to ", ", ")
                cells.append(f"{percent(value, 0)} ({bounds})" if bounds else percent(value, 0))
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


def title(inputs: ReportInputs) -> str:
    """The model and the ratios."""
    asked = [f"{run.ratio:g}" for run in inputs.runs if run.ratio is not None]
    listed = " and ".join(filter(None, [", ".join(asked[:-1]), *asked[-1:]]))
    return f"{inputs.model}, pruned at ratio{'s' if len(asked) > 1 else ''} {listed}" if asked else inputs.model


def _markdown(inputs: ReportInputs, runs: Sequence[Sequence[Row]], pictures: Mapping[str, Picture]) -> str:
    """Summary, tables, accuracies; where tables would be too long for a Prefect artifact, one table of the means."""
    model = inputs.model.replace("`", "'")  # in a code span nothing is markup, and the name cannot end it
    head = [f"# `{model}`{title(inputs).removeprefix(inputs.model)}", ""]
    texts, tables = [], []
    for run in runs:
        texts += [f"**{run_name(run[0]).capitalize()}.** " * (len(runs) > 1) + summary(inputs, run), ""]
        tables += _markdown_table(run_name(run[0]), [(row.benchmark, row) for row in run])
    notes = [line for note in floor_notes([row for run in runs for row in run]) for line in (note, "")]
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


def page_template(name: str) -> Template:
    """A page's template, with the filters that pages share."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html.j2"),  # data is text, never markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "span": span, "duration": _duration}
    return environment.get_template(name)


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
        notes=floor_notes([row for _, rows in runs for row in rows]),
        importance=pictures.get("importance"),
        prompts={name: first_sample(folder / "samples.txt") for name, folder in inputs.prompts.items()},
        settings=settings_of(inputs.config) if inputs.config else {},
        colours=COLOURS,
        resamples=RESAMPLES,
        mean=MEAN,
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def first_sample(file: Path) -> str:
    """The first prompt of `samples.txt`: its lines between the first two rulers."""
    try:
        parts = re.split(r"^──── .* ────$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{file}: missing or not UTF-8 text") from None
    text = parts[min(1, len(parts) - 1)].strip("\n")
    half = _PROMPT_CHARACTERS // 2
    if len(text) <= _PROMPT_CHARACTERS:
        return text
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def settings_of(config: RunConfig) -> dict[str, dict[str, str]]:
    """Section → field → value, as the configuration file would say them; fields without a value are left out.

    So is what cannot change a result (`execution`, `store`): the same results make the same report anywhere.
    """
    sections: dict[str, dict[str, str]] = {"": {}}
    for name, value in config.model_dump(mode="json", exclude_none=True, exclude={"execution", "store"}).items():
        if isinstance(value, dict):
            sections[name] = {key: json.dumps(inner, ensure_ascii=False) for key, inner in value.items()}
        elif name == "benchmarks":
            tables = [table["name"] if len(table) == 1 else table for table in value]
            sections[""][name] = json.dumps(tables, ensure_ascii=False)
        else:
            sections[""][name] = json.dumps(value, ensure_ascii=False)
    return sections
