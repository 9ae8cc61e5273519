"""Is pruning worth it beside quantisation? The part of a run's report on types of fewer bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from tailored_llama.config import DENSE
from tailored_llama.evaluation import TAILORED, WHOLE, Z95, BitsRow, bits_rows
from tailored_llama.reports.figures import COLOURS, WIDTH, Picture, new_figure, styled
from tailored_llama.reports.inputs import ReportInputs
from tailored_llama.reports.parts import percent
from tailored_llama.reports.text import plus_minus

WHEN_TO_PRUNE = "For speed, and for the memory of computing, prune all the same: docs/how-to/choose.md says when."
_MARKERS = "osD^vPX*"
_LINES = ("tailored", "line-1", "line-2", "line-3", "line-4")


def fewer_bits(inputs: ReportInputs) -> list[BitsRow]:
    """The rows of all runs, the dense model's once; none if nothing was scored in a type of fewer bits."""
    rows: list[BitsRow] = []
    for run in inputs.runs if inputs.quantised else ():
        if inputs.dense.parameters and run.pruned.parameters:
            parameters = {DENSE: inputs.dense.parameters, TAILORED: run.pruned.parameters}
            dense, tailored = _by_type(inputs, None, inputs.dense.scores), _by_type(inputs, run.ratio, run.tailored)
            rows += bits_rows(dense, tailored, parameters, run.ratio, inputs.config.seed if inputs.config else 0)
    return list(dict.fromkeys(rows))


def _by_type(inputs: ReportInputs, ratio: float | None, whole: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """The scores of a model by type and benchmark, first those of the model as it is."""
    by_type = {WHOLE: dict(whole)}
    for one in inputs.quantised:
        if one.ratio == ratio:
            by_type.setdefault(one.type, {})[one.benchmark] = one.scores
    return by_type


def bits_sentences(rows: Sequence[BitsRow]) -> list[str]:
    """What pruning and fewer bits save, each alone and both, and which of the two costs less accuracy."""
    by_type = {(row.ratio, row.type): row for row in rows}
    sentences = []
    for (ratio, kind), both in by_type.items():
        pruned, quantised = by_type.get((ratio, WHOLE)), by_type.get((None, kind))
        if ratio is None or kind == WHOLE or pruned is None or quantised is None:
            continue
        text = (
            f"Of the dense model's bytes in {WHOLE}, ratio {ratio:g} alone leaves {percent(pruned.of_dense, 0)}, "
            f"{kind} alone {percent(quantised.of_dense, 0)}, and both together {percent(both.of_dense, 0)}."
        )
        if quantised.bytes <= pruned.bytes:
            wins = quantised.accuracy >= pruned.accuracy
            text += f" The dense model in {kind} is smaller than the tailored one in {WHOLE}, "
            text += f"{'and' if wins else 'but'} scores {plus_minus(quantised)} against {plus_minus(pruned)}."
            text += " For size alone, quantise first." if wins else ""
        sentences.append(text)
    return [*sentences, WHEN_TO_PRUNE] if sentences else []


@styled
def bits_picture(rows: Sequence[BitsRow]) -> Picture:
    """Accuracy with 95 % intervals against bytes, a line for each model and a marker for each type."""
    ratios, types = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("ratio", "type"))
    tailored = [ratio for ratio in ratios if ratio is not None]
    markers = {kind: _MARKERS[number % 8] for number, kind in enumerate(types)}
    figure = new_figure(340, width=WIDTH * 2 // 3)
    axes, handles = figure.subplots(), []
    for ratio in ratios:
        colour = COLOURS["dense" if ratio is None else _LINES[tailored.index(ratio) % len(_LINES)]]
        own = sorted((row.bytes / 1e6, row.accuracy, Z95 * row.stderr, row.type) for row in rows if row.ratio == ratio)
        axes.plot([size for size, *_ in own], [accuracy for _, accuracy, *_ in own], color=colour, linewidth=1.2)
        for size, accuracy, whisker, kind in own:
            look: Any = {"color": colour, "marker": markers[kind], "markersize": 8}
            axes.errorbar(size, accuracy, whisker, elinewidth=1.2, capsize=3, **look)
        label = DENSE if ratio is None else f"{TAILORED}, ratio {ratio:g}" if tailored[1:] else TAILORED
        handles.append(Line2D([], [], color=colour, linewidth=4, label=label))
    for kind, marker in markers.items():
        handles.append(Line2D([], [], color=COLOURS["ink"], linestyle="none", marker=marker, label=kind))
    axes.set_xlim(0, 1.08 * max(row.bytes for row in rows) / 1e6)
    axes.set_xlabel("megabytes")
    axes.set_ylabel("accuracy")
    axes.grid(axis="y")
    figure.legend(handles=handles, loc="outside upper left", ncols=4, borderpad=0)
    return Picture(figure, "Accuracy against megabytes, dense and tailored, by type of the weights")
