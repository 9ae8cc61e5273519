"""The report of a prompt study: a table, a page that stands alone, and a Markdown summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from tailored_llama import comparison_plots
from tailored_llama.artifacts import write_table
from tailored_llama.pictures import COLOURS, Picture
from tailored_llama.prompt_study import (
    DIFFERENCES_SCHEMA,
    EVALUATION,
    REFERENCES,
    ROWS_SCHEMA,
    Difference,
    PromptStudyConfig,
    Row,
    Studied,
    study_differences,
    study_rows,
)
from tailored_llama.recovery import MEAN
from tailored_llama.report_parts import first_sample, number, page_template, settings_of
from tailored_llama.report_plots import markdown_picture
from tailored_llama.statistics import RESAMPLES, above_floor


def write_study(config: PromptStudyConfig, model: str, studied: Sequence[Studied], out: Path) -> None:
    """Stage: write `study.parquet`, `differences.parquet`, `study.html`, and `study.md` with `differences.png`.

    Args:
        config: the study's.
        model: what was scored, in words.
        studied: every benchmark's scores and prompts.
    """
    rows = study_rows(config, studied)
    differences = study_differences(config, studied, rows)
    for file, found, schema in (("study", rows, ROWS_SCHEMA), ("differences", differences, DIFFERENCES_SCHEMA)):
        columns = {name: [getattr(row, name) for row in found] for name in schema.names}
        write_table(out / f"{file}.parquet", columns, schema)
    picture = _picture(differences)
    (out / "study.html").write_text(_page(config, model, studied, rows, differences, picture), encoding="utf-8")
    (out / "study.md").write_text(_markdown(model, rows, differences, picture), encoding="utf-8")
    picture.save_png(out / "differences.png")


def summary(rows: Sequence[Row], differences: Sequence[Difference]) -> str:
    """The paper's question, answered in one sentence for each reference."""
    names = list(dict.fromkeys(row.benchmark for row in rows))
    texts = []
    for other in REFERENCES:
        last = [d for d in differences if d.other == other][-1]  # the mean, where there is one
        if last.benchmark != MEAN and len(names) > 1:
            continue
        if last.template == other:
            texts.append(f"The set chosen on the train split is {other} itself.")
            continue
        where = f"mean of {last.benchmarks} of {len(names)} benchmarks" if last.benchmark == MEAN else last.benchmark
        told = "" if last.low > 0 or last.high < 0 else "; these examples cannot tell them apart"
        texts.append(
            f"A set chosen on the train split scores {number(100 * abs(last.difference), 1)} points "
            f"{'less' if last.difference < 0 else 'more'} than {other} (95 % interval {points(last.low)} to "
            f"{points(last.high)}; {where}, {last.examples:,} examples{told})."
        )
    return " ".join(texts)


def points(share: float) -> str:
    """A difference of accuracies in points of a hundred, with its sign."""
    return ("+" if round(100 * share, 1) > 0 else "") + number(100 * share, 1)


def notes(rows: Sequence[Row]) -> list[str]:
    """What to mind: measures that differ, and benchmarks on which no set shows skill."""
    found = []
    for name in dict.fromkeys(row.benchmark for row in rows):
        mine = [row for row in rows if row.benchmark == name]
        if partial := list(dict.fromkeys(row.template for row in mine if row.partial)):
            found.append(
                f"On {name}, {' and '.join(partial)} scores the rest of the sentence after each choice (partial "
                "evaluation), the other sets score the choice: different measures. A difference between the two is not "
                "counted in the mean."
            )
        if not any(above_floor(row.accuracy, row.stderr, row.floor) for row in mine if row.split == EVALUATION):
            found.append(f"On {name} no set is significantly above the floor: its differences say little.")
    return found


def _cell(difference: Difference) -> str:
    return f"{points(difference.difference)} ({points(difference.low)}, {points(difference.high)})"


def _scored(rows: Sequence[Row], benchmark: str, template: str) -> Row | None:
    wanted = (benchmark, template, EVALUATION)
    return next((row for row in rows if (row.benchmark, row.template, row.split) == wanted), None)


def console_table(rows: Sequence[Row], differences: Sequence[Difference]) -> Table:
    """The table for a terminal of 80 characters; what to mind stands below it."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left", caption_style="none")
    legend = "Evaluation split: accuracy ± standard error; differences in points with 95 % intervals."
    table.caption = escape("\n".join([legend, *notes(rows)]))
    table.add_column("benchmark", overflow="fold")
    table.add_column("chosen on train", overflow="fold")
    for name in ("accuracy", *(f"− {other}" for other in REFERENCES)):
        table.add_column(name, justify="right")
    for name in dict.fromkeys(d.benchmark for d in differences):
        mine = {d.other: d for d in differences if d.benchmark == name}
        chosen = next(iter(mine.values())).template
        row = _scored(rows, name, chosen) if chosen else None
        accuracy = f"{number(row.accuracy)}±{number(row.stderr).lstrip('0')}" if row else ""
        cells = [name, chosen or "", accuracy, *(_cell(mine[o]) if o in mine else "–" for o in REFERENCES)]
        table.add_row(*map(escape, cells), style="bold" if name == MEAN else None)
    return table


def _markdown(model: str, rows: Sequence[Row], differences: Sequence[Difference], picture: Picture) -> str:
    title = model.replace("`", "'")
    lines = [f"# Prompts for `{title}`", "", summary(rows, differences), ""]
    lines += [line for note in notes(rows) for line in (note, "")]
    names = ["benchmark", "metric", "examples", "floor", "chosen on train", "chosen", *REFERENCES]
    names += [f"chosen − {other}" for other in REFERENCES]
    lines += [f"| {' | '.join(names)} |", "|:--|:--|--:|--:|:--|--:|--:|--:|--:|--:|"]
    for name in dict.fromkeys(d.benchmark for d in differences):
        mine = {d.other: d for d in differences if d.benchmark == name}
        first = next(iter(mine.values()))
        scored = [_scored(rows, name, t) for t in (first.template or "", *REFERENCES)]
        row = scored[0]
        cells = [name, row.metric, f"{row.examples:,}", number(row.floor)] if row else [name, "", "", "–"]
        cells += [first.template or ""]
        cells += [f"{number(s.accuracy)} ± {number(s.stderr)}" if s else "–" for s in scored]
        cells += [_cell(mine[other]) if other in mine else "–" for other in REFERENCES]
        lines.append(f"| {' | '.join(cells)} |")
    legend = "Accuracy ± standard error on the evaluation split; differences in points, with paired 95 % intervals."
    return "\n".join([*lines, "", legend, "", markdown_picture("differences", picture), ""])


def study_settings(config: PromptStudyConfig) -> dict[str, dict[str, str]]:
    """The settings that a study reads, as `settings_of`."""
    sections = settings_of(config)
    making = ("calibration", "pruning", "reconstruction", "distillation", "healing", "prompts")
    pruning = () if config.pruned else making
    for name in ("perplexity", "profile", *pruning):
        del sections[name]
    sections["tuning"] = {name: sections["tuning"][name] for name in ("shots", "held_out")}  # what the slice is not of
    return sections


def _picture(differences: Sequence[Difference]) -> Picture:
    of = {(d.benchmark, d.other): d for d in differences}
    listed = list(dict.fromkeys(d.benchmark for d in differences))
    panels = {
        f"chosen − {other}": [
            (100 * d.difference, 100 * d.low, 100 * d.high) if (d := of.get((name, other))) else None for name in listed
        ]
        for other in REFERENCES
    }
    names = ["mean" if name == MEAN else name for name in listed]
    what = "Differences of accuracy with 95 % intervals"
    return comparison_plots.intervals(names, panels, 0, "points of accuracy", what)


def _page(
    config: PromptStudyConfig,
    model: str,
    studied: Sequence[Studied],
    rows: Sequence[Row],
    differences: Sequence[Difference],
    picture: Picture,
) -> str:
    names = [one.benchmark.name for one in studied]
    return page_template("prompt_study.html.j2").render(
        title=f"Prompts for {model}",
        config=config,
        summary=summary(rows, differences),
        notes=notes(rows),
        names=names,
        listed=[*names, *([MEAN] if len(names) > 1 else [])],
        mean=MEAN,
        chosen={one.benchmark.name: one.chosen for one in studied},
        templates=list(dict.fromkeys(name for one in studied for name in one.selection)),
        references=REFERENCES,
        row={(row.benchmark, row.template, row.split): row for row in rows},
        difference={(d.benchmark, d.other): d for d in differences},
        points=points,
        figure=picture,
        samples={
            one.benchmark.name: {name: first_sample(folder / "samples.txt") for name, folder in one.prompts.items()}
            for one in studied
        },
        settings=study_settings(config),
        colours=COLOURS,
        resamples=RESAMPLES,
    )
