"""Pages: the shape that all reports share, for a terminal, in Markdown and in HTML; and the page to label rows on."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import TypeAdapter

from tailored_llama.config import RunConfig
from tailored_llama.data import NONE, Asked, read_prompts
from tailored_llama.evaluation import RESAMPLES
from tailored_llama.files import unfinished
from tailored_llama.reports.figures import COLOURS, Picture
from tailored_llama.reports.parts import number, percent, span
from tailored_llama.reports.tables import Table, as_text, markdown

_PROMPT_CHARACTERS = 3_000  # a longer prompt loses its middle


@dataclass(frozen=True)
class Section:
    """A part of a report: pictures by the names of their PNG files, a table, and, in HTML alone, samples of text.

    A sample has a heading of its own. A section without content is left out.
    """

    heading: str
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    table: Table = field(default_factory=Table)
    samples: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Report:
    """The content of a report, the same on every surface; a terminal shows the first table, the lead and the notes.

    `lead` is the result in sentences. `figures` are its main figures, each with a name; they follow the first sentence.
    `notes` are what to know of it, and what failed.
    """

    title: str
    lead: Sequence[str]
    notes: Sequence[str]
    sections: Sequence[Section]
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    figures: Sequence[tuple[str, str]] = ()


def write_pages(report: Report, name: str, out: Path, **measured: Any) -> None:
    """Write `NAME.html`, `NAME.md` with PNG files, and `table.json` for a terminal.

    `measured` is read by `measured_NAME.html.j2`, which says how the figures came about.
    """
    table = next(section.table for section in report.sections if section.table.rows)
    shown = replace(table, notes=(*table.notes, *lines_of(report.lead, report.figures), *report.notes))
    (out / "table.json").write_bytes(TypeAdapter(Table).dump_json(shown))
    page = from_template("page.html.j2", report=report, name=name, **measured)
    (out / f"{name}.html").write_text(page, encoding="utf-8")
    (out / f"{name}.md").write_text(from_template("page.md.j2", report=report), encoding="utf-8")
    for section in report.sections:
        for file, picture in section.pictures.items():
            picture.save_png(out / f"{file}.png")


def write_label_page(page: Path, file: Path, rows: Sequence[Asked]) -> None:
    """Write a page that needs no server and saves rows as the file, whose name decides between CSV and JSONL."""
    html = from_template("to_label.html.j2", rows=[asdict(row) for row in rows], neither=NONE, file=file.name)
    with unfinished(page) as new:
        new.write_text(html, encoding="utf-8")


def lines_of(lead: Sequence[str], figures: Sequence[tuple[str, str]]) -> list[str]:
    """The sentences of a result with its figures behind the first, as lines of text."""
    return [*lead[:1], *(f"{name}: {value}" for name, value in figures), *lead[1:]]


def from_template(template: str, **context: Any) -> str:
    """A page or a part of one, from its template."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html.j2"),  # data is text, never markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["as_line"] = lambda text: re.sub(r"([\\`*_])", r"\\\1", as_text(text))  # names in a heading
    environment.filters |= {function.__name__: function for function in (number, percent, span, markdown, as_text)}
    environment.globals |= {"colours": COLOURS, "resamples": RESAMPLES}
    return environment.get_template(template).render(context).strip() + "\n"


def first_sample(prompts: Path) -> str:
    """The first prompt that is scored, of a folder of rendered prompts; a context that choices share comes once."""
    prompt = read_prompts(prompts, "evaluation")[0]
    lines: list[str] = []
    for i, (context, continuation) in enumerate(zip(prompt.contexts, prompt.continuations, strict=True)):
        lines += [] if context in lines else [context]
        lines.append(f"    ⟦{continuation}⟧{'  ← right' if i == prompt.answer else ''}")
    return shorten("\n".join(lines), _PROMPT_CHARACTERS)


def shorten(text: str, most: int) -> str:
    """A text without its middle, if it has more than so many characters."""
    half = most // 2
    left_out = f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"
    return text if len(text) <= most else left_out


def settings_of(config: RunConfig, unread: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Section → field → value, as in a configuration file, without unset fields and sections that nothing reads.

    `execution` and `store` are left out: they cannot change a result, and the same results give the same report.
    """
    sections: dict[str, dict[str, str]] = {"": {}}
    hidden = {"execution", "store", *unread}
    for name, value in config.model_dump(mode="json", exclude_none=True, exclude=hidden).items():
        section, fields = (name, value) if isinstance(value, dict) else ("", {name: value})
        if name == "benchmarks":
            fields = {name: [table["name"] if len(table) == 1 else table for table in value]}
        texts = {key: json.dumps(inner, ensure_ascii=False) for key, inner in fields.items()}
        sections.setdefault(section, {}).update(texts)
    return sections
