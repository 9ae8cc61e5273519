"""Plots of one run: accuracies, the split between tokens and layers, and losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter

from tailored_llama.config import DENSE, TUNED_DENSE
from tailored_llama.evaluation import MODELS, Z95, RecoveryTable
from tailored_llama.pruning import Split, read_tried
from tailored_llama.reports.figures import COLOURS, WIDTH, Picture, new_figure, styled, wrap_name, xy
from tailored_llama.reports.inputs import RunResults
from tailored_llama.store import read_table
from tailored_llama.training import LOG_SCHEMA


def picture_name(kind: str, ratio: float | None) -> str:
    """The name of a run's picture, which is also its file name without extension."""
    return kind if ratio is None else f"{kind}-{ratio}"


def report_pictures(runs: Sequence[RunResults]) -> dict[str, Picture]:
    """The pictures of a report by name: the accuracy, the split and the losses of every run."""
    pictures = {}
    for run in runs:
        ratio = run.table.ratio
        pictures[picture_name("accuracy", ratio)] = _accuracies(run.table)
        if run.plan and len(tried := read_tried(run.plan)) > 1:
            pictures[picture_name("split", ratio)] = _split(tried)
        if run.adapters:
            pictures[picture_name("losses", ratio)] = _losses(run.adapters)
    return pictures


@styled
def _accuracies(table: RecoveryTable) -> Picture:
    """Bars of accuracy per benchmark with 95 % intervals, and each benchmark's floor as a dashed line."""
    names, series = table.benchmarks, {}
    for model in (DENSE, TUNED_DENSE, *MODELS[1:]):
        known = [(i, row) for i, name in enumerate(names) if (row := table.row(model, name))]
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
