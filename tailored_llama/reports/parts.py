"""Parts that all reports share: number formats, cells of tables, page templates, sample prompts and settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from tailored_llama.config import RunConfig
from tailored_llama.errors import InputError
from tailored_llama.evaluation import BitsRow, RecoveryRow, TemplateRow
from tailored_llama.reports.figures import COLOURS, Picture
from tailored_llama.reports.tables import Cell

NO_DIFFERENCE = "no difference measured"
_PROMPT_CHARACTERS = 3_000  # a longer prompt is cut in the middle


def number(value: float | None, digits: int = 3) -> str:
    """A number with a true minus sign and thousands separators; a dash for None, ∞ if unbounded."""
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−").replace("inf", "∞")


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; a dash for None."""
    return "–" if value is None else f"{number(100 * value, digits)}\N{NO-BREAK SPACE}%"


def span(low: float | None, high: float | None, digits: int = 1) -> str:
    """A 95 % interval of a fraction, in percent; empty for None."""
    if low is None or high is None:
        return ""
    between = " to " if low < 0 else "–"
    return f"{number(100 * low, digits)}{between}{number(100 * high, digits)}\N{NO-BREAK SPACE}%"


def share(value: float | None, low: float | None, high: float | None, digits: int = 1) -> str:
    """A fraction as a percentage, with its interval in brackets if it has one: "97.9 % (94–103)"."""
    bounds = span(low, high, 0).removesuffix("\N{NO-BREAK SPACE}%").replace(" to ", ", ")
    return f"{percent(value, digits)} ({bounds})" if bounds else percent(value, digits)


def accuracy_cell(value: float | None, error: float | None) -> Cell:
    """An accuracy ± its standard error; a dash for None."""
    if value is None:
        return Cell("–")
    return Cell(f"{number(value)} ± {number(error)}", brief=f"{number(value)}±{number(error).lstrip('0')}")


def accuracy_of(row: RecoveryRow | BitsRow | TemplateRow | None) -> Cell:
    """The accuracy in a row ± its standard error; a dash without a row."""
    return accuracy_cell(row.accuracy, row.stderr) if row else accuracy_cell(None, None)


def share_cell(value: float | None, low: float | None, high: float | None, more: str = "", digits: int = 0) -> Cell:
    """A fraction as a percentage, with its interval and `more` below it; `digits` are those on a terminal."""
    under = () if value is None else tuple(filter(None, (span(low, high), more)))
    return Cell(percent(value), under, share(value, low, high, digits))


def page_template(name: str) -> Template:
    """A page template with the shared filters."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=name.endswith(".html.j2"),  # data is text, never markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "span": span,
        "duration": _duration,
        "points": points,
        "speedup": speedup,
    }
    environment.globals |= {"colours": COLOURS}
    return environment.get_template(name)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def first_sample(file: Path) -> str:
    """The first prompt of `samples.txt`: the lines between the first two rulers."""
    try:
        parts = re.split(r"^──── .* ────$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{file}: missing or not UTF-8 text") from None
    text = parts[min(1, len(parts) - 1)].strip("\n")
    half = _PROMPT_CHARACTERS // 2
    if len(text) <= _PROMPT_CHARACTERS:
        return text
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def settings_of(config: RunConfig) -> dict[str, dict[str, str]]:
    """Section → field → value, as in a configuration file, without unset fields.

    `execution` and `store` are left out: they cannot change a result, and the same results give the same report.
    """
    sections: dict[str, dict[str, str]] = {"": {}}
    for name, value in config.model_dump(mode="json", exclude_none=True, exclude={"execution", "store"}).items():
        if isinstance(value, dict):
            sections[name] = {key: json.dumps(inner, ensure_ascii=False) for key, inner in value.items()}
        elif name == "benchmarks":
            tables = [table["name"] if len(table) == 1 else table for table in value]
            sections[""][name] = json.dumps(tables, ensure_ascii=False)
        else:
            sections[""][name] = json.dumps(value, ensure_ascii=False)
    return sections


def markdown_page(*parts: str) -> str:
    """A Markdown page of headings, paragraphs, tables and pictures; empty ones are left out."""
    return "\n\n".join([*filter(None, parts), ""]).removesuffix("\n")


def as_code(name: str) -> str:
    """A name as a code span of Markdown, where nothing is markup, whatever the name contains."""
    return "`" + name.replace("`", "'") + "`"


def markdown_picture(name: str, picture: Picture) -> str:
    """Markdown that shows a picture from the PNG file beside the page."""
    return f"![{picture.label.translate(str.maketrans('[]', '()'))}]({name}.png)"


def points(share: float | None) -> str:
    """A difference of accuracies in points (hundredths of accuracy), with its sign; a dash for None."""
    return "–" if share is None else f"{round(100 * share, 1) + 0.0:+.1f}".replace("-", "−")


def speedup(row: Any, phase: str) -> str:
    """How many times the dense model's speed a row has in a phase, prefill or decode; empty where nothing was timed.

    The figure is the median of pairs of passes. Where some pairs say faster and others slower, there is no figure.
    """
    value, low, high = (getattr(row, f"{phase}_speedup{end}") for end in ("", "_low", "_high"))
    if value is None:
        return ""
    return NO_DIFFERENCE if low <= 1 <= high else f"×{number(value, 2)}"
