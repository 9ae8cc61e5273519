"""One table for every surface: declared once, shown on a terminal, in Markdown and, by `page.html.j2`, in HTML."""

import html
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import rich.table
from pydantic import TypeAdapter
from rich import box
from rich.text import Text

from tailored_llama.errors import InputError

_LINKS = re.compile(r"(?<=\])[(:]|:(?=//)|(?<=www)\.", re.IGNORECASE)  # what makes text a link in Markdown


@dataclass(frozen=True)
class Cell:
    """A cell: its text, smaller lines below it, and what a terminal shows instead of both.

    Markdown has the lines below in brackets; empty ones are left out. HTML has the text lead to `link`.
    """

    text: str
    under: tuple[str, ...] = ()
    brief: str | None = None
    link: str = ""


@dataclass(frozen=True)
class Column:
    """A column: its title, smaller lines below that, and how it is set.

    `left` columns hold words, which may wrap; figures stand on the right and stay whole. A terminal has no room for
    `wide` columns.
    """

    title: str
    left: bool = False
    wide: bool = False
    under: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row of cells. If there are fewer than columns, the last one spans the rest; a single one is a heading."""

    cells: tuple[Cell, ...]
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """Columns and rows, with notes to stand below them."""

    columns: tuple[Column, ...] = ()
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()


def table_row(*cells: Cell | str, bold: bool = False) -> Row:
    """A row of cells, or of texts that need nothing more."""
    return Row(tuple(Cell(cell) if isinstance(cell, str) else cell for cell in cells), bold)


def stored_table(report: Path) -> rich.table.Table:
    """The table that a terminal shows of a report's folder.

    Raises:
        InputError: `table.json` is missing or broken.
    """
    try:
        return terminal(TypeAdapter(Table).validate_json((report / "table.json").read_bytes()))
    except (OSError, ValueError):
        raise InputError(f"{report / 'table.json'}: missing or not the table of a report") from None


def terminal(table: Table) -> rich.table.Table:
    """The table as rich prints it, without its wide columns; the notes are its caption."""
    shown = rich.table.Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left")
    shown.caption = Text("\n".join(table.notes))
    for column in table.columns:
        if not column.wide:
            side: Literal["left", "right"] = "left" if column.left else "right"
            shown.add_column(Text(column.title), justify=side, no_wrap=not column.left, overflow="fold")
    for line in table.rows:
        heading = len(line.cells) == 1
        if heading:
            shown.add_section()
        texts = []
        for cell, column in zip(line.cells, table.columns, strict=False):
            if not column.wide:
                whole = " ".join([cell.text, *(f"({under})" for under in cell.under if under)])
                texts.append(Text(whole if cell.brief is None else cell.brief))
        shown.add_row(*texts, style="bold" if line.bold or heading else None)
    return shown


def markdown(table: Table) -> str:
    """The table in Markdown, with its notes below. Figures never break at a space or a dash."""
    lines = [
        f"| {' | '.join(_in_line(Cell(column.title, column.under)) for column in table.columns)} |",
        f"|{'|'.join(':--' if column.left else '--:' for column in table.columns)}|",
    ]
    for line in table.rows:
        rest = len(table.columns) - len(line.cells)
        wraps = [column.left or bool(rest) for column in table.columns]
        cells = [_in_line(cell, whole=not wrap) for cell, wrap in zip(line.cells, wraps, strict=False)]
        if len(cells) == 1:
            cells = [f"**{cells[0]}**"]
        lines.append(f"| {' | '.join([*cells, *[''] * rest])} |")
    return "\n\n".join(["\n".join(lines), *map(as_text, table.notes)])


def as_text(text: str) -> str:
    """A text in Markdown, in which no name from outside is HTML, an image or a link, nor defines or becomes one."""
    return _LINKS.sub(lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False))


def _in_line(cell: Cell, whole: bool = False) -> str:
    """A cell in one line, with markup and the "|" that would end it escaped; `whole` texts do not break."""
    parts = [cell.text, "; ".join(filter(None, cell.under))]
    if whole:
        parts = [re.sub(r"(?<=\d)–(?=\d)", " to ", part).replace(" ", "\xa0") for part in parts]
    parts = [re.sub(r"(?<=[-_])\n", "", part).replace("\n", " ") for part in parts]
    text, under = (as_text(part).replace("|", "&#124;") for part in parts)
    return f"{text} ({under})".strip() if under else text
