"""Plots of one run: accuracies, kept widths, importance and losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from tailored_llama.config import DENSE, TUNED_DENSE
from tailored_llama.evaluation import MODELS, Z95, Array, RecoveryTable
from tailored_llama.pruning import IMPORTANCE_SCHEMA, Split, read_plan, read_tried
from tailored_llama.reports.figures import COLOURS, WIDTH, Picture, new_figure, styled, wrap_name, xy
from tailored_llama.reports.inputs import ReportInputs, RunResults
from tailored_llama.store import read_table
from tailored_llama.training import LOG_SCHEMA

KIND_NAMES = {"attention": "attention groups", "mlp": "MLP channels"}


def picture_name(kind: str, ratio: float | None) -> str:
    """The name of a run's picture, which is also its file name without extension."""
    return kind if ratio is None else f"{kind}-{ratio}"


def report_pictures(
    inputs: ReportInputs, runs: Sequence[tuple[RunResults, RecoveryTable]], against: Sequence[RecoveryTable] = ()
) -> dict[str, Picture]:
    """The pictures of a report by name: importance, and the accuracy, widths and losses of every run.

    `against` are the tables of the tuned dense model, if there is one; its accuracies are drawn beside the others.
    """
    tuned = {table.ratio: table for table in against}
    pictures = {"importance": _importance(inputs.importance)} if inputs.importance else {}
    for run, table in runs:
        pictures[picture_name("accuracy", run.ratio)] = _accuracies(table, tuned.get(run.ratio))
        if run.plan:
            pictures[picture_name("widths", run.ratio)] = _widths(run.plan)
            if len(tried := read_tried(run.plan)) > 1:
                pictures[picture_name("split", run.ratio)] = _split(tried)
        if run.logs:
            pictures[picture_name("losses", run.ratio)] = _losses(run.logs)
    return pictures


@styled
def _accuracies(table: RecoveryTable, against: RecoveryTable | None) -> Picture:
    """Bars of accuracy per benchmark with 95 % intervals, and each benchmark's floor as a dashed line."""
    names, series = table.benchmarks, {}
    sources = {DENSE: table} | ({TUNED_DENSE: against} if against else {}) | dict.fromkeys(MODELS[1:], table)
    for model, source in sources.items():
        known = [(i, row) for i, name in enumerate(names) if (row := source.row(model, name))]
        if known:
            series[model] = [(i, row.accuracy or 0.0, Z95 * (row.stderr or 0.0)) for i, row in known]
    floors = [table.any_row(name).floor for name in names]
    colours = {model: COLOURS["line-1" if model == TUNED_DENSE else model] for model in series}
    least = WIDTH // 2 + 110 * max(0, len(series) - len(MODELS))  # room for the legend
    figure = new_figure(340, width=min(WIDTH, max(least, 80 + 180 * len(names))))
    axes, width = figure.subplots(), 0.78 / len(series)
    for number, (model, bars) in enumerate(series.items()):
        places, values, whiskers = zip(*bars, strict=True)
        at = [place + (number - (len(series) - 1) / 2) * width for place in places]
        axes.bar(at, values, 0.92 * width, color=colours[model])
        axes.errorbar(at, values, whiskers, fmt="none", ecolor=COLOURS["ink"], elinewidth=1.2, capsize=3)
    for i, floor in enumerate(floors):
        axes.hlines(floor, i - 0.45, i + 0.45, COLOURS["ink"], linestyles=(0, (4, 2)), linewidth=1.5)
    axes.set_xticks(range(len(names)), [wrap_name(name) for name in names])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(names) - 0.4)
    tops = [value + whisker for bars in series.values() for _, value, whisker in bars]
    axes.set_ylim(0, min(1.0, max([*tops, *floors, 0.1]) + 0.05))
    axes.set_ylabel("accuracy")
    axes.grid(axis="y")
    handles: list[Any] = [Patch(color=colour, label=model) for model, colour in colours.items()]
    handles.append(Line2D([], [], color=COLOURS["ink"], dashes=(4, 2), linewidth=1.5, label="floor"))
    figure.legend(handles=handles, loc="outside upper left", ncols=5, borderpad=0)
    return Picture(figure, "Accuracy by benchmark: " + ", ".join(series) + " and the floor")


@styled
def _widths(folder: Path) -> Picture:
    """Share of each layer's attention groups and MLP channels that the plan keeps."""
    table = read_plan(folder)
    layer, kind, kept = (table[name].to_numpy() for name in ("layer", "kind", "kept"))
    figure, panels = _kind_panels(kind, 250, "kept")
    for name, axes in panels.items():
        of_kind = kind == name
        layers, groups = np.unique(layer[of_kind], return_counts=True)
        kept_groups = np.bincount(layer[of_kind], weights=kept[of_kind], minlength=int(layers.max()) + 1)[layers]
        axes.bar(layers, 1, 0.82, color=COLOURS["grid"])
        axes.bar(layers, kept_groups / groups, 0.82, color=COLOURS["pruned"])
        per_layer = " to ".join(f"{count:,}" for count in sorted({groups.min(), groups.max()}))
        share = 100 * kept_groups.sum() / groups.sum()
        axes.set_title(f"{KIND_NAMES[name]} ({per_layer} per layer; {share:.0f} % kept)")
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    return Picture(figure, "Share of each layer that pruning keeps")


@styled
def _split(tried: Sequence[Split]) -> Picture:
    """What each split of the ratio between tokens and layers costs, the chosen one ringed."""
    figure = new_figure(260, width=WIDTH // 2 + 110)
    axes, costs = figure.subplots(), [split.nats_per_byte or 0.0 for split in tried]
    tokens, best = [split.tokens for split in tried], int(np.argmin(costs))
    axes.plot(tokens, costs, color=COLOURS["pruned"], linewidth=2, marker="o", markersize=5)
    axes.plot(tokens[best], costs[best], "o", markersize=12, markerfacecolor="none", color=COLOURS["tailored"])
    for at, split in zip(tokens, tried, strict=True):
        place = (at, split.nats_per_byte or 0.0)
        axes.annotate(f"{split.body_ratio:.0%}", place, (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens kept; at each point, what the layers lose")
    axes.set_ylabel("nats per byte")
    axes.margins(y=0.15)
    axes.grid(axis="y")
    return Picture(figure, "Loss on held-out prompts by the number of tokens that stay")


@styled
def _importance(folder: Path) -> Picture:
    """Median importance of a coupled group in each layer, with the range of the middle 80 %."""
    table = read_table(folder / "importance.parquet", IMPORTANCE_SCHEMA)
    layer, kind, score = (table[name].to_numpy() for name in ("layer", "kind", "score"))
    figure, panels = _kind_panels(kind, 280, "importance")
    for name, axes in panels.items():
        layers = np.unique(layer[kind == name])
        spread = np.array([np.quantile(score[(kind == name) & (layer == n)], (0.1, 0.5, 0.9)) for n in layers])
        axes.fill_between(layers, spread[:, 0], spread[:, 2], color=COLOURS["dense"], alpha=0.3, linewidth=0)
        axes.plot(layers, spread[:, 1], color=COLOURS["dense"], linewidth=2, marker="o", markersize=4)
        if spread.min() > 0:
            axes.set_yscale("log")
            low, high = math.floor(math.log10(spread.min())), math.ceil(math.log10(spread.max()))
            axes.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
            axes.yaxis.set_major_formatter(_power_of_ten)
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(KIND_NAMES[name])
        axes.grid(axis="y")
    return Picture(figure, "Importance of the groups of each layer")


@styled
def _losses(folders: Mapping[str, Path]) -> Picture:
    """Training loss of every step and held-out loss of every epoch, one panel for each benchmark's adapter."""
    columns = min(3, len(folders))
    rows = math.ceil(len(folders) / columns)
    figure = new_figure(60 + 225 * rows, width=WIDTH if columns > 1 else WIDTH // 2)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    best: Any = {"markersize": 11, "markerfacecolor": "none", "color": COLOURS["tailored"], "marker": "o"}
    for axes, (name, folder) in zip(panels, folders.items(), strict=False):
        log = read_table(folder / "log.parquet", LOG_SCHEMA).to_pydict()
        train, held = (
            [(step, loss) for step, loss in zip(log["step"], log[column], strict=True) if loss is not None]
            for column in ("loss", "held_out_loss")
        )
        axes.plot(*xy(train), color=COLOURS["dense"], linewidth=1.5, label="training")
        axes.plot(*xy(held), color=COLOURS["tailored"], linewidth=2, marker="o", markersize=5, label="held out")
        if held:
            axes.plot(*xy([min(held, key=lambda point: point[1])]), linestyle="none", label="adapter kept", **best)
        axes.set_title(name)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.05, y=0.12)
        axes.grid(axis="y")
    for axes in panels[len(folders) :]:
        axes.remove()
    for axes in panels[max(0, len(folders) - columns) : len(folders)]:  # the bottom panel of each column
        axes.set_xlabel("step")
    for axes in panels[: len(folders) : columns]:
        axes.set_ylabel("loss")
    figure.legend(handles=panels[0].get_lines(), loc="outside upper left", ncols=3, borderpad=0)
    return Picture(figure, "Training and held-out loss by benchmark")


def _power_of_ten(value: float, _position: float) -> str:
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _kind_panels(kind: Array, height: int, ylabel: str) -> tuple[Figure, dict[str, Axes]]:
    """One panel over the layers for each kind of group present."""
    names = [name for name in KIND_NAMES if (kind == name).any()]
    figure = new_figure(height)
    panels = dict(zip(names, figure.subplots(1, len(names), squeeze=False).ravel(), strict=True))
    panels[names[0]].set_ylabel(ylabel)
    for axes in panels.values():
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.margins(x=0.02)
    return figure, panels
