"""What all pages share: HTML templates, Markdown, sample prompts and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from tailored_llama.config import RunConfig
from tailored_llama.data import read_prompts
from tailored_llama.evaluation import RESAMPLES
from tailored_llama.reports.figures import COLOURS, Picture
from tailored_llama.reports.parts import number, percent, points, span
from tailored_llama.reports.tables import markdown

_PROMPT_CHARACTERS = 3_000  # a longer prompt is cut in the middle


def page_template(name: str) -> Template:
    """A page template with the shared filters."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=name.endswith(".html.j2"),  # data is text, never markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = (number, percent, points, span, duration, first_sample, shorten, markdown, markdown_picture, as_code)
    environment.filters |= {function.__name__: function for function in shared}
    environment.globals |= {"colours": COLOURS, "resamples": RESAMPLES}
    return environment.get_template(name)


def write_page(template: str, file: Path, context: Mapping[str, Any]) -> None:
    """Write an HTML or Markdown page from its template; a page without content is an empty file."""
    text = page_template(template).render(context).strip()
    file.write_text(f"{text}\n" if text else "", encoding="utf-8")


def duration(seconds: float) -> str:
    """Seconds in the units that a reader would choose."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


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
    if len(text) <= most:
        return text
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


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


def as_code(name: str) -> str:
    """A name as a code span of Markdown, where nothing is markup, whatever the name contains."""
    return "`" + name.replace("`", "'") + "`"


def markdown_picture(name: str, picture: Picture) -> str:
    """Markdown that shows a picture from the PNG file beside the page."""
    return f"![{picture.label.translate(str.maketrans('[]', '()'))}]({name}.png)"
