"""The report of a prompt study: what choosing a template set gains over one set for all benchmarks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tailored_llama import evaluation
from tailored_llama.config import REFERENCES, PromptStudyConfig
from tailored_llama.evaluation import EVALUATION, MEAN, Difference, StudiedBenchmark, TemplateRow
from tailored_llama.reports.figures import Picture, intervals
from tailored_llama.reports.pages import Report, Section, first_sample, settings_of, write_pages
from tailored_llama.reports.parts import accuracy_of, number, points
from tailored_llama.reports.tables import Cell, Column, Table, table_row
from tailored_llama.store import write_rows


def write_study(config: PromptStudyConfig, model: str, studied: Sequence[StudiedBenchmark[Path]], *, out: Path) -> None:
    """Stage: write the pages, `study.parquet` and `differences.parquet`; `model` is the scored model in words."""
    rows = evaluation.study_rows(config, studied)
    differences = evaluation.study_differences(config, studied, rows)
    write_rows(out / "study.parquet", rows, TemplateRow)
    write_rows(out / "differences.parquet", differences, Difference)
    making = () if config.pruned else ("calibration", "pruning", "reconstruction", "healing", "prompts")
    settings = settings_of(config, ("perplexity", "profile", *making))
    settings["tuning"] = {name: settings["tuning"][name] for name in ("shots", "held_out")}  # not in the slice
    samples = [
        (f"{results.benchmark}, {template}{' (chosen)' if template == results.chosen else ''}", first_sample(folder))
        for results in studied
        for template, folder in results.prompts.items()
    ]
    report = Report(
        f"Prompts for {model}",
        [summary(rows, differences)],
        notes(rows),
        [
            Section("What choosing gains", {"differences": _picture(differences)}, _table(rows, differences)),
            Section("On the slice of the train split", table=_selection(studied, rows)),
            Section("What the model is asked", samples=samples),
        ],
        settings,
    )
    write_pages(report, "study", out, config=config)


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
    """The sets with another measure, and the benchmarks on which no set shows skill."""
    scored = [row for row in rows if row.split == EVALUATION]
    able = {row.benchmark for row in scored if evaluation.above_floor(row.accuracy, row.stderr, row.floor)}
    weak = dict.fromkeys(row.benchmark for row in scored if row.benchmark not in able)
    measures = [
        f"On {name}, {template} scores the rest of the sentence after each choice (partial evaluation). Scoring the "
        "choice itself is another measure, so the mean leaves out a difference between the two."
        for name, template in dict.fromkeys((row.benchmark, row.template) for row in rows if row.partial)
    ]
    little = [f"On {name} no set is significantly above the floor; its differences say little." for name in weak]
    return [*measures, *little]


def _table(rows: Sequence[TemplateRow], differences: Sequence[Difference]) -> Table:
    """The chosen set and the references on the evaluation split, benchmark by benchmark, and the mean difference."""
    scored = {(row.benchmark, row.template): row for row in rows if row.split == EVALUATION}
    found = {(compared.benchmark, compared.other): compared for compared in differences}
    columns = (
        Column("benchmark", left=True),
        Column("examples", wide=True),
        Column("floor", wide=True),
        Column("chosen\non train", left=True),
        Column("chosen"),
        *(Column(other, wide=True) for other in REFERENCES),
        *(Column(f"chosen −\n{other}") for other in REFERENCES),
    )
    lines = []
    for name, chosen in {compared.benchmark: compared.template for compared in differences}.items():
        gains = [_gain(found.get((name, other)), len({row.benchmark for row in rows})) for other in REFERENCES]
        if chosen is None:
            lines.append(table_row("mean", *[""] * (len(columns) - 1 - len(gains)), *gains, bold=True))
            continue
        best, *others = (scored[name, template] for template in (chosen, *REFERENCES))
        about = (Cell(name, (best.metric,), name), number(best.examples, 0), number(best.floor), chosen)
        lines.append(table_row(*about, *map(accuracy_of, (best, *others)), *gains))
    legend = "Evaluation split: accuracy ± standard error; differences in points, with paired 95 % intervals."
    return Table(columns, tuple(lines), (legend,))


def _gain(compared: Difference | None, benchmarks: int) -> Cell:
    """A difference in points, its interval, and what else there is to say of it; a mean is over some benchmarks."""
    if compared is None:
        return Cell("–")
    difference, low, high = map(points, (compared.difference, compared.low, compared.high))
    under = [f"{low} to {high}"]
    if compared.template == compared.other:
        under = ["same set"]
    elif not compared.same_measure:
        under.append("different measure")
    elif compared.benchmark == MEAN:
        under.append(f"over {compared.benchmarks} of {benchmarks}")
    return Cell(difference, tuple(under), f"{difference} ({low}, {high})")


def _selection(studied: Sequence[StudiedBenchmark[Path]], rows: Sequence[TemplateRow]) -> Table:
    scored = {(row.benchmark, row.template): row for row in rows if row.split != EVALUATION}
    templates = list(dict.fromkeys(name for results in studied for name in results.selection))
    columns = [Column("benchmark", left=True), *map(Column, ["examples", "floor", *templates])]
    lines = []
    for results in studied:
        name, best = results.benchmark, scored[results.benchmark, results.chosen]
        cells = [accuracy_of(scored.get((name, template))) for template in templates]
        cells[templates.index(results.chosen)] = replace(accuracy_of(best), under=("chosen",))
        lines.append(table_row(name, number(best.examples, 0), number(best.floor), *cells))
    return Table(tuple(columns), tuple(lines))


def _picture(differences: Sequence[Difference]) -> Picture:
    pairs = {(d.benchmark, d.other): (d.difference, d.low, d.high) for d in differences}
    benchmarks = list(dict.fromkeys(d.benchmark for d in differences))
    unknown = (None, None, None)
    panels = {f"chosen − {other}": [pairs.get((name, other), unknown) for name in benchmarks] for other in REFERENCES}
    names = ["mean" if name == MEAN else name for name in benchmarks]
    return intervals(names, panels, 0, "points of accuracy", "Differences of accuracy with 95 % intervals")
