"""Plots of the reports: each function turns plain arrays into one `Picture`.

For a page of ours it is an inline SVG, whose colours are names that the style sheet resolves (`var(--dense)` …), so
that one picture serves a light and a dark page; text stays text, in the page's font. Where only images are shown it is
a small PNG. The same data always gives the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from PIL import Image

from tailored_llama.statistics import Z95

Array = np.ndarray[Any, Any]
Measured = tuple[float, float] | None  # accuracy, standard error

# Told apart by the colour-blind (Okabe & Ito). Each hex stands for its name and is used by nothing else.
COLOURS = {
    "ink": "#24292f",
    "grid": "#d9dde2",
    "dense": "#6e7781",
    "pruned": "#e69f00",
    "tailored": "#0072b2",
    "line-1": "#009e73",
    "line-2": "#d55e00",
    "line-3": "#cc79a7",
    "line-4": "#56b4e9",
}
_LINES = ("tailored", "pruned", "line-1", "line-2", "line-3", "line-4")  # colours of curves, in order
_DASHES: Any = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # after the last colour they begin again, dashed
KIND_NAMES = {"attention": "attention groups", "mlp": "MLP channels"}
_WIDTH = 980  # CSS pixels
_PNG_DPI = 110  # a page of Prefect is narrower than ours: what fills ours is shrunk there, what fills half of it is not
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tailored-llama",
    "text.parse_math": False,  # a "$" in a name is a dollar
    "font.family": "DejaVu Sans",  # comes with matplotlib: the layout does not depend on the machine
    "font.size": 10.5,  # points: 14 CSS pixels
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "grid.color": COLOURS["grid"],
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """A figure, and what it shows, in words, for those who do not see it."""

    figure: Figure
    label: str

    def __html__(self) -> str:
        """An <svg> element for an HTML page: no prolog, no metadata, no name spaces, ids of its own."""
        buffer = io.StringIO()
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
        referenced = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
        text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in referenced else "", text)
        for name, colour in COLOURS.items():
            text = text.replace(colour, f"var(--{name})")
        return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(self.label)}" ', 1)

    def save_png(self, path: Path) -> None:
        """Write a PNG on white, with a palette of 64 colours: a quarter of the bytes, and nothing lost to the eye."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(buffer, format="png", dpi=_PNG_DPI, facecolor="white")
        with Image.open(buffer) as image:
            image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def accuracy_bars(
    names: Sequence[str], floors: Sequence[float | None], series: Mapping[str, Sequence[Measured]]
) -> Picture:
    """Bars of accuracy per benchmark with 95 % intervals, and each benchmark's floor as a dashed line.

    Args:
        names: of the benchmarks.
        floors: one per benchmark.
        series: dense, pruned, tailored → one value per benchmark; None draws no bar.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _figure(340, width=min(_WIDTH, max(_WIDTH // 2, 80 + 180 * len(names))))
        axes = figure.subplots()
        width = 0.78 / max(1, len(series))
        for number, (model, values) in enumerate(series.items()):
            at = [i + (number - (len(series) - 1) / 2) * width for i, v in enumerate(values) if v is not None]
            known = [v for v in values if v is not None]
            axes.bar(at, [v for v, _ in known], 0.92 * width, color=COLOURS[model])
            axes.errorbar(
                at,
                [v for v, _ in known],
                [Z95 * e for _, e in known],
                fmt="none",
                ecolor=COLOURS["ink"],
                elinewidth=1.2,
                capsize=3,
            )
        for i, floor in enumerate(floors):
            if floor is not None:
                axes.hlines(floor, i - 0.45, i + 0.45, COLOURS["ink"], linestyles=(0, (4, 2)), linewidth=1.5)
        axes.set_xticks(range(len(names)), [_short(name) for name in names])
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.6, len(names) - 0.4)
        tops = [v + Z95 * e for values in series.values() for v, e in filter(None, values)]
        axes.set_ylim(0, min(1.0, max([*tops, *(f for f in floors if f), 0.1]) + 0.05))
        axes.set_ylabel("accuracy")
        axes.grid(axis="y")
        handles: list[Any] = [Patch(color=COLOURS[model], label=model) for model in series]
        handles.append(Line2D([], [], color=COLOURS["ink"], dashes=(4, 2), linewidth=1.5, label="floor"))
        figure.legend(handles=handles, loc="outside upper left", ncols=4, borderpad=0)
        return Picture(figure, "Accuracy by benchmark: " + ", ".join(series) + " and the floor")


def layer_widths(layer: Array, kind: Array, kept: Array) -> Picture:
    """Share of each layer's attention groups and MLP channels that the plan keeps.

    Args:
        layer: of each group, int [groups].
        kind: of each group, attention or mlp.
        kept: whether the group stays, bool [groups].
    """
    with matplotlib.rc_context(_STYLE):
        figure, panels = _kind_panels(kind, 250)
        for name, axes in panels.items():
            here = kind == name
            layers, groups = np.unique(layer[here], return_counts=True)
            stay = np.bincount(layer[here], weights=kept[here], minlength=int(layers.max()) + 1)[layers]
            axes.bar(layers, 1, 0.82, color=COLOURS["grid"])
            axes.bar(layers, stay / groups, 0.82, color=COLOURS["pruned"])
            per_layer = f"{groups[0]:,}" if len(set(groups.tolist())) == 1 else f"{groups.min():,} to {groups.max():,}"
            share = 100 * stay.sum() / groups.sum()
            axes.set_title(f"{KIND_NAMES[name]} ({per_layer} per layer; {share:.0f} % kept)")
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
        next(iter(panels.values())).set_ylabel("kept")
        return Picture(figure, "Share of each layer that pruning keeps")


def importance_by_layer(layer: Array, kind: Array, score: Array) -> Picture:
    """Median importance of a coupled group in each layer, with the range of the middle 80 %.

    Args:
        layer: of each group, int [groups].
        kind: of each group, attention or mlp.
        score: its importance, float [groups].
    """
    with matplotlib.rc_context(_STYLE):
        figure, panels = _kind_panels(kind, 280)
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
        next(iter(panels.values())).set_ylabel("importance")
        return Picture(figure, "Importance of the groups of each layer")


def loss_curves(logs: Mapping[str, Mapping[str, Sequence[Any]]]) -> Picture:
    """Training loss of every step and held-out loss of every epoch, one panel per benchmark.

    Args:
        logs: benchmark → the columns step, loss and held_out_loss of `log.parquet`; None where not measured.
    """
    with matplotlib.rc_context(_STYLE):
        columns = min(3, len(logs))
        rows = math.ceil(len(logs) / columns)
        figure = _figure(60 + 225 * rows, width=_WIDTH if columns > 1 else _WIDTH // 2)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (name, log) in zip(panels, logs.items(), strict=False):
            train = [(s, v) for s, v in zip(log["step"], log["loss"], strict=True) if v is not None]
            held = [(s, v) for s, v in zip(log["step"], log["held_out_loss"], strict=True) if v is not None]
            axes.plot(*_xy(train), color=COLOURS["dense"], linewidth=1.5)
            axes.plot(*_xy(held), color=COLOURS["tailored"], linewidth=2, marker="o", markersize=5)
            if held:
                best = min(held, key=lambda point: point[1])
                axes.plot(*best, "o", markersize=11, markerfacecolor="none", markeredgecolor=COLOURS["tailored"])
            axes.set_title(name)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.margins(x=0.05, y=0.12)
            axes.grid(axis="y")
        for axes in panels[len(logs) :]:
            axes.remove()
        for axes in panels[max(0, len(logs) - columns) : len(logs)]:  # the lowest of each column
            axes.set_xlabel("step")
        for axes in panels[: len(logs) : columns]:
            axes.set_ylabel("loss")
        handles = [
            Line2D([], [], color=COLOURS["dense"], linewidth=1.5, label="training"),
            Line2D([], [], color=COLOURS["tailored"], linewidth=2, marker="o", markersize=5, label="held out"),
            Line2D(
                [], [], color=COLOURS["tailored"], linestyle="none", marker="o", markersize=11,
                markerfacecolor="none", label="adapter kept",
            ),
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside upper left", ncols=3, borderpad=0)
        return Picture(figure, "Training and held-out loss by benchmark")


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    ylabel: str,
    reference: float,
    log: bool = False,
    xlabel: str | None = None,
    shares: bool = False,
) -> Picture:
    """One line for each setting, and the dense model's value as a reference.

    Args:
        series: setting → points (place, value).
        ylabel: what the values are.
        reference: the dense model's value.
        log: whether values are drawn on a logarithmic scale.
        xlabel: what the places are; None: the share of parameters removed.
        shares: whether values are shares, to be written as percentages.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _figure(420 + 11 * len(series))
        axes = figure.subplots()
        for number, (label, points) in enumerate(series.items()):
            colour, dash = COLOURS[_LINES[number % len(_LINES)]], _DASHES[number // len(_LINES) % len(_DASHES)]
            axes.plot(*_xy(sorted(points)), color=colour, linestyle=dash, linewidth=2, marker="o", label=label)
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


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Array,
    texts: Sequence[Sequence[str]],
    bold: Array,
    lead: int,
    labels: tuple[str, str],
    unit: str,
) -> Picture:
    """A field of cells on a scale that parts at 0, blue above and orange below; text in each; the diagonal framed.

    Args:
        rows: their names; those that are also a column's meet it on the diagonal.
        columns: their names.
        values: what is shown as colour, float [rows, columns]; NaN stays blank.
        texts: what stands in each cell, [rows][columns].
        bold: which texts are bold, bool [rows, columns].
        lead: how many rows stand apart from the rest, above it.
        labels: of the rows below the lead, and of the columns.
        unit: of the values.
    """
    limit = max(1.0, math.ceil(np.max(np.abs(values), initial=0.0, where=~np.isnan(values))))
    lines = max(text.count("\n") + 1 for row in texts for text in row)
    cell = min(120, max(64, 820 // len(columns)))  # CSS pixels
    height = 20 * lines + 14
    at = [i + 0.25 * (i >= lead) for i in range(len(rows))]
    with matplotlib.rc_context(_STYLE):
        figure = _figure(110 + height * (len(rows) + 1), width=max(560, 160 + cell * len(columns)))
        axes = figure.subplots()
        for (i, j), value in np.ndenumerate(values):
            box: Any = {"xy": (j - 0.5, at[i] - 0.5), "width": 1, "height": 1}
            if not math.isnan(value):
                axes.add_patch(Rectangle(**box, linewidth=0, **_shade(value / limit)))
            axes.add_patch(Rectangle(**box, fill=False, edgecolor=COLOURS["grid"], linewidth=1))
            weight = "bold" if bold[i, j] else "normal"
            axes.text(j, at[i], texts[i][j], ha="center", va="center", weight=weight, linespacing=1.35)
        for i, j in ((rows.index(name), j) for j, name in enumerate(columns) if name in rows):
            frame = Rectangle((j - 0.5, at[i] - 0.5), 1, 1, fill=False, edgecolor=COLOURS["ink"], linewidth=2)
            axes.add_patch(frame).set_zorder(3)
        axes.set_xlim(-0.52, len(columns) - 0.48)
        axes.set_ylim(at[-1] + 0.52, -0.52)
        names = [_short(name) for name in columns]
        if any(8 * len(line) > cell for name in names for line in name.split("\n")):  # names would run into another
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
        scale = [(f"{limit * part:+g}".replace("-", "−"), _shade(part)) for part in (-1, -0.5, 0.5, 1)]
        handles: list[Any] = [Patch(label=text, **shade) for text, shade in scale]
        handles.insert(2, Patch(label="0", facecolor="none", edgecolor=COLOURS["grid"]))
        handles[-1].set_label(f"{handles[-1].get_label()} {unit}")
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), borderpad=0)
        return Picture(figure, f"Heat map of {unit}: {labels[0]} {', '.join(rows)}; {labels[1]} {', '.join(columns)}")


def _shade(part: float) -> dict[str, Any]:
    """Colour of a share of the scale, −1 to 1; never so strong that the text on it cannot be read."""
    return {"facecolor": COLOURS["tailored" if part > 0 else "line-2"], "alpha": 0.55 * abs(part)}


def differences(names: Sequence[str], panels: Mapping[str, Sequence[tuple[float, float, float] | None]]) -> Picture:
    """Differences of accuracy with their 95 % intervals: a row for each name, a panel for each comparison.

    Args:
        names: of the rows, from the top.
        panels: title → difference, low and high of every row; None draws nothing.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _figure(90 + 30 * len(names))
        for axes, (title, values) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
            axes.axvline(0, color=COLOURS["ink"], linewidth=1.2)
            for row, value in enumerate(values):
                if value is not None:
                    axes.hlines(row, 100 * value[1], 100 * value[2], COLOURS["tailored"], linewidth=2.5)
                    axes.plot(100 * value[0], row, "o", color=COLOURS["tailored"], markersize=7)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.margins(x=0.08)
            axes.set_title(title)
            axes.set_xlabel("points of accuracy")
            axes.xaxis.set_major_locator(MaxNLocator(7))
            axes.grid(axis="x")
        return Picture(figure, "Differences of accuracy with 95 % intervals: " + ", ".join(panels))


def _power_of_ten(value: float, _position: float) -> str:
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _short(name: str) -> str:
    """A name on lines of at most about 12 characters, broken at underscores and hyphens."""
    lines = [""]
    for part in re.split(r"(?<=[_-])", name):
        if lines[-1] and len(lines[-1]) + len(part) > 13:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _figure(height: int, width: int = _WIDTH) -> Figure:
    return Figure(figsize=(width / 96, height / 96), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))


def _kind_panels(kind: Array, height: int) -> tuple[Figure, dict[str, Axes]]:
    """One panel over the layers for each kind of group there is."""
    names = [name for name in KIND_NAMES if (kind == name).any()]
    figure = _figure(height)
    panels = dict(zip(names, figure.subplots(1, len(names), squeeze=False).ravel(), strict=True))
    for axes in panels.values():
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.margins(x=0.02)
    return figure, panels
