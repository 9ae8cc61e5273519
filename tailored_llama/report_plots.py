"""The pictures of a report: shown on its page, and kept beside it as PNG files, which two Markdown pages show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tailored_llama import run_plots
from tailored_llama.artifacts import read_table
from tailored_llama.pictures import Picture
from tailored_llama.pruning.importance import IMPORTANCE_SCHEMA
from tailored_llama.pruning.plan import read_plan
from tailored_llama.recovery import MEAN, MODELS, PrunedRun, ReportInputs, Row
from tailored_llama.training import LOG_SCHEMA


def picture_name(what: str, ratio: float | None) -> str:
    """What a run's picture is called, and its file without the ending."""
    return what if ratio is None else f"{what}-{ratio}"


def report_pictures(inputs: ReportInputs, runs: Sequence[tuple[PrunedRun, Sequence[Row]]]) -> dict[str, Picture]:
    """Every picture of a report by its name: importance; and accuracy, widths and losses of every run."""
    found = {"importance": _importance(inputs.importance)} if inputs.importance else {}
    for run, rows in runs:
        found[picture_name("accuracy", run.ratio)] = _bars([row for row in rows if row.benchmark != MEAN])
        if run.plan:
            found[picture_name("widths", run.ratio)] = _widths(run.plan)
        if run.logs:
            found[picture_name("losses", run.ratio)] = _losses(run.logs)
    return found


def markdown_picture(name: str, picture: Picture) -> str:
    """A picture on a Markdown page, from the PNG file beside it."""
    return f"![{picture.label.translate(str.maketrans('[]', '()'))}]({name}.png)"


def plots_page(inputs: ReportInputs, pictures: Mapping[str, Picture]) -> str:
    """All but the accuracies, which stand beside their table, as Markdown; empty where there is nothing."""
    criterion = f", criterion `{inputs.config.pruning.criterion}`" if inputs.config else ""
    sections = {
        "widths": ("What pruning kept", "The share of each layer's groups that stayed."),
        "importance": (
            "What was important",
            "Importance of one group in the dense model, layer by layer: the median, and the middle 80 % of the "
            f"layer's groups{criterion}. Higher means keep.",
        ),
        "losses": (
            "How tuning went",
            "Loss of each step, and of held-out train examples after each epoch. The adapter with the lowest held-out "
            "loss (ringed) is kept.",
        ),
    }
    lines = []
    for what, (heading, caption) in sections.items():
        if shown := [name for name in pictures if name.partition("-")[0] == what]:
            lines += [f"## {heading}", "", caption, ""]
            for name in shown:
                ratio = name.partition("-")[2]
                lines += [f"Ratio {ratio}:", ""] if len(shown) > 1 else []
                lines += [markdown_picture(name, pictures[name]), ""]
    return "\n".join(lines)


def _bars(rows: Sequence[Row]) -> Picture:
    series: dict[str, list[tuple[float, float] | None]] = {
        model: [
            None if getattr(row, model) is None else (getattr(row, model), getattr(row, f"{model}_stderr"))
            for row in rows
        ]
        for model in MODELS
    }
    scored = {model: values for model, values in series.items() if any(values)}
    return run_plots.accuracy_bars([row.benchmark for row in rows], [row.floor for row in rows], scored)


def _widths(folder: Path) -> Picture:
    table = read_plan(folder)
    return run_plots.layer_widths(*(table[name].to_numpy() for name in ("layer", "kind", "kept")))


def _importance(folder: Path) -> Picture:
    table = read_table(folder / "importance.parquet", IMPORTANCE_SCHEMA)
    return run_plots.importance_by_layer(*(table[name].to_numpy() for name in ("layer", "kind", "score")))


def _losses(folders: Mapping[str, Path]) -> Picture:
    return run_plots.loss_curves(
        {name: read_table(folder / "log.parquet", LOG_SCHEMA).to_pydict() for name, folder in folders.items()}
    )
