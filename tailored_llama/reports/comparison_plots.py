"""Plots that compare runs or scores: curves, a frontier, a heat map and intervals, each drawn from plain arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from tailored_llama.reports.figures import COLOURS, Picture, new_figure, styled, wrap_name, xy

_LINES = ("tailored", "pruned", "line-1", "line-2", "line-3", "line-4")  # colours of curves, in order
_DASHES: Any = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # colours repeat with the next dash


@styled
def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    ylabel: str,
    reference: float | None,
    log: bool = False,
    xlabel: str | None = None,
    shares: bool = False,
) -> Picture:
    """One line through the points (x, value) of each setting, and the dense model's value, if given, as a reference.

    With `shares`, values are fractions, shown as percentages. Without `xlabel`, x is the share of parameters removed.
    """
    figure = new_figure(420 + 11 * len(series))
    axes = figure.subplots()
    for number, (label, points) in enumerate(series.items()):
        colour, dash = COLOURS[_LINES[number % len(_LINES)]], _DASHES[number // len(_LINES) % len(_DASHES)]
        axes.plot(*xy(sorted(points)), color=colour, linestyle=dash, linewidth=2, marker="o", label=label)
    if reference is not None:
        axes.axhline(reference, color=COLOURS["dense"], linewidth=1.5, linestyle=(0, (4, 2)), label="dense")
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif shares:
        axes.yaxis.set_major_formatter(PercentFormatter(1, None, " %"))
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel or "parameters removed")
    if xlabel is None:
        axes.xaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=2, borderpad=0)
    over = xlabel or "the share of parameters removed"
    return Picture(figure, f"{ylabel} over {over}: " + ", ".join(series))


@dataclass(frozen=True)
class Line:
    """A line of a frontier: the path that is drawn, and the points that were measured. Dense models have grey ones."""

    path: Sequence[tuple[float, float]]
    points: Sequence[tuple[float, float]]
    dense: bool = False


@styled
def frontier(
    lines: Mapping[str, Line],
    margin: float,
    ringed: Sequence[tuple[float, float]],
    answer: tuple[float, float, str] | None,
    labels: tuple[str, str],
) -> Picture:
    """Losses in points over costs, the worst at the bottom, with the margin as a line.

    Losses beyond eight margins are cut off. `ringed` are the points of candidates that were chosen for the proof,
    `answer` is the point of the proven one, with its name. `labels` are those of the axes.
    """
    figure = new_figure(440 + 11 * len(lines))
    axes, ladders, dense = figure.subplots(), count(), count()
    for label, line in lines.items():
        if line.dense:
            style = {"color": COLOURS["dense"], "linestyle": _DASHES[1 + next(dense) % 2]}
        else:
            dash, colour = divmod(next(ladders), len(_LINES))
            style = {"color": COLOURS[_LINES[colour]], "linestyle": _DASHES[dash % len(_DASHES)]}
        axes.plot(*xy(sorted(line.path)), **style, linewidth=2, label=label)
        axes.plot(*xy(line.points), "s" if line.dense else "o", color=style["color"], markersize=6)
    ring: Any = {"linestyle": "none", "marker": "o", "markerfacecolor": "none", "markeredgecolor": COLOURS["ink"]}
    if ringed:
        axes.plot(*xy(ringed), **ring, markersize=13, label="chosen for the proof")
    if answer:
        x, y, text = answer
        axes.plot(x, y, **ring, markersize=17, markeredgewidth=3, label="proven: the answer")
        axes.annotate(text, (x, y), (-12, 7), textcoords="offset points", ha="right")  # nothing smaller loses less
    axes.axhline(margin, color=COLOURS["ink"], linewidth=1.5, linestyle=(0, (4, 2)), label=f"margin: {margin:g} points")
    losses = [y for line in lines.values() for _, y in (*line.path, *line.points)]
    worst, best = min(max(1.5 * margin, *losses), 8 * margin), min(0, *losses)
    axes.set_ylim(worst + (worst - best) / 20, best - (worst - best) / 10)
    axes.margins(x=0.09)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=2, borderpad=0, markerscale=0.6)
    return Picture(figure, f"{labels[1]} over {labels[0]}: {', '.join(lines)}")


@dataclass(frozen=True)
class HeatCell:
    """A cell of a heat map: the value shown as colour, NaN for none, and the text on it."""

    value: float
    text: str
    bold: bool = False


@styled
def heat_map(
    grid: Mapping[str, Sequence[HeatCell]], columns: Sequence[str], lead: int, labels: tuple[str, str], unit: str
) -> Picture:
    """Coloured cells with text, blue above 0 and orange below; cells whose row and column share a name are framed.

    The first `lead` rows are set apart. `labels` are those of the rows below them and of the columns.
    """
    rows, cells = list(grid), [cell for line in grid.values() for cell in line]
    limit = max([1, *(math.ceil(abs(cell.value)) for cell in cells if not math.isnan(cell.value))])
    width = min(120, max(64, 820 // len(columns)))  # of a cell, in CSS pixels
    height = 20 * max(cell.text.count("\n") + 1 for cell in cells) + 14
    at = [i + 0.25 * (i >= lead) for i in range(len(rows))]
    figure = new_figure(110 + height * (len(rows) + 1), width=max(560, 160 + width * len(columns)))
    axes = figure.subplots()
    for i, line in enumerate(grid.values()):
        for j, cell in enumerate(line):
            box: Any = {"xy": (j - 0.5, at[i] - 0.5), "width": 1, "height": 1}
            if not math.isnan(cell.value):
                axes.add_patch(Rectangle(**box, linewidth=0, **_shade(cell.value / limit)))
            axes.add_patch(Rectangle(**box, fill=False, edgecolor=COLOURS["grid"], linewidth=1))
            weight = "bold" if cell.bold else "normal"
            axes.text(j, at[i], cell.text, ha="center", va="center", weight=weight, linespacing=1.35)
    for i, j in ((rows.index(name), j) for j, name in enumerate(columns) if name in rows):
        frame = Rectangle((j - 0.5, at[i] - 0.5), 1, 1, fill=False, edgecolor=COLOURS["ink"], linewidth=2)
        axes.add_patch(frame).set_zorder(3)
    axes.set_xlim(-0.52, len(columns) - 0.48)
    axes.set_ylim(at[-1] + 0.52, -0.52)
    names = [wrap_name(name) for name in columns]
    if any(8 * len(line) > width for name in names for line in name.split("\n")):  # horizontal names would overlap
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="left", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(columns)), names)
    axes.set_yticks(at, rows)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(labels[1], labelpad=10)
    axes.set_ylabel(labels[0], labelpad=10, y=1 - (lead + len(rows)) / 2 / len(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    shades: list[Any] = [_shade(part) for part in (-1, -0.5, 0.5, 1)]
    shades.insert(2, {"facecolor": "none", "edgecolor": COLOURS["grid"]})
    names = [f"{limit * part:+g}".replace("-", "−").replace("+0", "0") for part in (-1, -0.5, 0, 0.5, 1)]
    names[-1] += f" {unit}"
    handles = [Patch(label=name, **shade) for name, shade in zip(names, shades, strict=True)]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), borderpad=0)
    return Picture(figure, f"Heat map of {unit}: {labels[0]} {', '.join(rows)}; {labels[1]} {', '.join(columns)}")


def _shade(part: float) -> dict[str, Any]:
    """Colour of a value from −1 to 1 on the scale, faint enough to read the text on it."""
    return {"facecolor": COLOURS["tailored" if part > 0 else "line-2"], "alpha": 0.55 * abs(part)}


@styled
def intervals(
    names: Sequence[str],
    panels: Mapping[str, Sequence[tuple[float, float, float] | None]],
    reference: float,
    unit: str,
    label: str,
) -> Picture:
    """Values with their intervals: a row for each name, a panel for each kind of value.

    A panel has value, low and high of every row, or None where there is nothing to draw, and a line at the reference,
    such as no difference or the dense model. The label describes the values in the picture's text alternative.
    """
    figure = new_figure(90 + 30 * len(names))
    panel_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, values) in zip(panel_axes, panels.items(), strict=True):
        axes.axvline(reference, color=COLOURS["ink"], linewidth=1.2)
        for row, value in enumerate(values):
            if value is not None:
                axes.hlines(row, *value[1:], COLOURS["tailored"], linewidth=2.5)
                axes.plot(value[0], row, "o", color=COLOURS["tailored"], markersize=7)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.08)
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.grid(axis="x")
    return Picture(figure, f"{label}: {', '.join(panels)}")
