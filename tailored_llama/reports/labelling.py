"""The page on which a person labels the rows that a proof needs: one file that works without a server."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tailored_llama.data import NONE, Asked
from tailored_llama.files import unfinished
from tailored_llama.reports.pages import from_template


def write_label_page(page: Path, file: Path, rows: Sequence[Asked]) -> None:
    """Write the page; it saves the rows as the file, whose name decides between CSV and JSONL."""
    html = from_template("to_label.html.j2", rows=[asdict(row) for row in rows], neither=NONE, file=file.name)
    with unfinished(page) as new:
        new.write_text(html, encoding="utf-8")
