"""The pictures of the reports: their common style, and their conversion to SVG and PNG.

HTML reports embed pictures as SVG. Its colours are variables of the style sheet (`var(--dense)` …), so that one picture
serves light and dark pages; its text stays text, in the page's font. Markdown pages show a small PNG. The same data
always gives the same bytes.
"""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

# Safe for colour-blind readers (Okabe & Ito). Each hex stands for its name and is used by nothing else.
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
WIDTH = 980  # CSS pixels
_CURVES = ("tailored", "pruned", "line-1", "line-2", "line-3", "line-4")  # colours, in order
DASHES: Any = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # colours repeat with the next dash
_PNG_DPI = 110  # Prefect's pages are narrower than our reports and shrink only their full-width pictures
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tailored-llama",
    "text.parse_math": False,  # a "$" in a name is no markup
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same layout on every machine
    "font.size": 10.5,  # points: 14 CSS pixels
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), COLOURS["ink"]),
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), COLOURS["ink"]),
    "grid.color": COLOURS["grid"],
    "legend.frameon": False,
}

styled = matplotlib.rc_context(STYLE)  # a decorator of functions that draw


@dataclass(frozen=True)
class Picture:
    """A figure, with a label as its text alternative, and a caption."""

    figure: Figure
    label: str
    caption: str = ""

    @styled
    def __post_init__(self) -> None:
        """Lay the figure out once: its SVG and its PNG would each do so again, which takes longer than drawing."""
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine(None)

    @styled
    def __html__(self) -> str:
        """An <svg> element for an HTML page, without prolog, metadata, namespaces and unused ids."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
        referenced = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
        text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in referenced else "", text)
        for name, colour in COLOURS.items():
            text = text.replace(colour, f"var(--{name})")
        return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(self.label)}" ', 1)

    @styled
    def save_png(self, path: Path) -> None:
        """Write a PNG on white, with a palette of 64 colours: a quarter of the bytes, and no visible loss."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=_PNG_DPI, facecolor="white")
        with Image.open(buffer) as image:
            image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def new_figure(height: int, width: int = WIDTH) -> Figure:
    """An empty figure; height and width in CSS pixels."""
    return Figure(figsize=(width / 96, height / 96), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))


def curve_style(nth: int) -> dict[str, Any]:
    """Colour and dash of the nth curve of a picture."""
    dash, colour = divmod(nth, len(_CURVES))
    return {"color": COLOURS[_CURVES[colour]], "linestyle": DASHES[dash % len(DASHES)]}


def xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The x and y values of points, as matplotlib takes them."""
    return [x for x, _ in points], [y for _, y in points]


def name_ticks(axes: Axes, names: Sequence[str], width: float) -> None:
    """Names at x = 0, 1, …, on lines of 13 characters; tilted if such a line is wider than so many CSS pixels."""
    pieces = [re.findall(r".{1,13}(?:(?<=[-_.])|$)|[^-_.]+[-_.]?", name) for name in names]
    if max(len(piece) for of_name in pieces for piece in of_name) * 8 > width:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(names)), ["\n".join(of_name) for of_name in pieces])
