"""The report of a prompt study: a table, a self-contained HTML page, and a Markdown summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from tailored_llama.config import REFERENCES, PromptStudyConfig
from tailored_llama.evaluation import (
    EVALUATION,
    MEAN,
    RESAMPLES,
    Difference,
    Studied,
    TemplateRow,
    above_floor,
    read_study,
    study_differences,
    study_rows,
)
from tailored_llama.reports import comparison_plots
from tailored_llama.reports.figures import Picture
from tailored_llama.reports.parts import first_sample, markdown_picture, number, page_template, points, settings_of
from tailored_llama.store import write_rows

STAGE, VERSION = "prompt-study", 3


def write_study(config: PromptStudyConfig, model: str, studied: Sequence[Studied], *, out: Path) -> None:
    """Stage: write `study.parquet`, `differences.parquet`, `study.html`, and `study.md` with `differences.png`.

    Args:
        config: the study's configuration.
        model: a description of the scored model.
        studied: the scores and prompts of every benchmark.
    """
    rows = study_rows(config, studied)
    differences = study_differences(config, studied, rows)
    write_rows(out / "study.parquet", rows, TemplateRow)
    write_rows(out / "differences.parquet", differences, Difference)
    picture = _picture(differences)
    (out / "study.html").write_text(_page(config, model, studied, rows, differences, picture), encoding="utf-8")
    (out / "study.md").write_text(_markdown(model, rows, differences, picture), encoding="utf-8")
    picture.save_png(out / "differences.png")


def summary(rows: Sequence[TemplateRow], differences: Sequence[Difference]) -> str:
    """The answer to the paper's question, one sentence for each reference."""
    names = list(dict.fromkeys(row.benchmark for row in rows))
    texts = []
    for other in REFERENCES:
        last = [d for d in differences if d.other == other][-1]  # the mean, if there is one
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


def notes(rows: Sequence[TemplateRow]) -> list[str]:
    """Caveats: sets with different measures, and benchmarks on which no set shows skill."""
    texts = []
    for name in dict.fromkeys(row.benchmark for row in rows):
        own_rows = [row for row in rows if row.benchmark == name]
        if partial := list(dict.fromkeys(row.template for row in own_rows if row.partial)):
            texts.append(
                f"On {name}, {' and '.join(partial)} scores the rest of the sentence after each choice (partial "
                "evaluation); the other sets score the choice. These are different measures, so the mean leaves out a "
                "difference between them."
            )
        if not any(above_floor(row.accuracy, row.stderr, row.floor) for row in own_rows if row.split == EVALUATION):
            texts.append(f"On {name} no set is significantly above the floor; its differences say little.")
    return texts


def _cell(difference: Difference) -> str:
    return f"{points(difference.difference)} ({points(difference.low)}, {points(difference.high)})"


def _scored(rows: Sequence[TemplateRow], benchmark: str, template: str) -> TemplateRow | None:
    wanted = (benchmark, template, EVALUATION)
    return next((row for row in rows if (row.benchmark, row.template, row.split) == wanted), None)


def study_table(folder: Path) -> Table:
    """The table of a study's folder, 80 characters wide, with notes below it."""
    rows, differences = read_study(folder)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left", caption_style="none")
    legend = "Evaluation split: accuracy ± standard error; differences in points with 95 % intervals."
    table.caption = escape("\n".join([legend, *notes(rows)]))
    table.add_column("benchmark", overflow="fold")
    table.add_column("chosen on train", overflow="fold")
    for name in ("accuracy", *(f"− {other}" for other in REFERENCES)):
        table.add_column(name, justify="right")
    for name in dict.fromkeys(d.benchmark for d in differences):
        against = {d.other: d for d in differences if d.benchmark == name}
        chosen = next(iter(against.values())).template
        row = _scored(rows, name, chosen) if chosen else None
        accuracy = f"{number(row.accuracy)}±{number(row.stderr).lstrip('0')}" if row else ""
        cells = [name, chosen or "", accuracy, *(_cell(against[o]) if o in against else "–" for o in REFERENCES)]
        table.add_row(*map(escape, cells), style="bold" if name == MEAN else None)
    return table


def _markdown(model: str, rows: Sequence[TemplateRow], differences: Sequence[Difference], picture: Picture) -> str:
    title = model.replace("`", "'")
    lines = [f"# Prompts for `{title}`", "", summary(rows, differences), ""]
    lines += [line for note in notes(rows) for line in (note, "")]
    names = ["benchmark", "metric", "examples", "floor", "chosen on train", "chosen", *REFERENCES]
    names += [f"chosen − {other}" for other in REFERENCES]
    lines += [f"| {' | '.join(names)} |", "|:--|:--|--:|--:|:--|--:|--:|--:|--:|--:|"]
    for name in dict.fromkeys(d.benchmark for d in differences):
        by_reference = {d.other: d for d in differences if d.benchmark == name}
        first = next(iter(by_reference.values()))
        scored = [_scored(rows, name, t) for t in (first.template or "", *REFERENCES)]
        row = scored[0]
        cells = [name, row.metric, f"{row.examples:,}", number(row.floor)] if row else [name, "", "", "–"]
        cells += [first.template or ""]
        cells += [f"{number(s.accuracy)} ± {number(s.stderr)}" if s else "–" for s in scored]
        cells += [_cell(by_reference[other]) if other in by_reference else "–" for other in REFERENCES]
        lines.append(f"| {' | '.join(cells)} |")
    legend = "Accuracy ± standard error on the evaluation split; differences in points, with paired 95 % intervals."
    return "\n".join([*lines, "", legend, "", markdown_picture("differences", picture), ""])


def study_settings(config: PromptStudyConfig) -> dict[str, dict[str, str]]:
    """The settings that a study reads, as `settings_of` gives them."""
    sections = settings_of(config)
    making = ("calibration", "pruning", "reconstruction", "distillation", "healing", "prompts")
    pruning = () if config.pruned else making
    for name in ("perplexity", "profile", *pruning):
        del sections[name]
    sections["tuning"] = {name: sections["tuning"][name] for name in ("shots", "held_out")}  # not in the slice
    return sections


def _picture(differences: Sequence[Difference]) -> Picture:
    pairs = {(d.benchmark, d.other): d for d in differences}
    listed = list(dict.fromkeys(d.benchmark for d in differences))
    panels = {
        f"chosen − {other}": [
            (100 * d.difference, 100 * d.low, 100 * d.high) if (d := pairs.get((name, other))) else None
            for name in listed
        ]
        for other in REFERENCES
    }
    names = ["mean" if name == MEAN else name for name in listed]
    label = "Differences of accuracy with 95 % intervals"
    return comparison_plots.intervals(names, panels, 0, "points of accuracy", label)


def _page(
    config: PromptStudyConfig,
    model: str,
    studied: Sequence[Studied],
    rows: Sequence[TemplateRow],
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
        figure=picture,
        samples={
            one.benchmark.name: {name: first_sample(folder / "samples.txt") for name, folder in one.prompts.items()}
            for one in studied
        },
        settings=study_settings(config),
        resamples=RESAMPLES,
    )
