"""The Markdown artifacts that a run shows in the Prefect UI, with their pictures embedded."""

from __future__ import annotations

import base64
import math
import re
from datetime import UTC, datetime
from pathlib import Path

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext

from tailored_llama import reports
from tailored_llama.config import StoreConfig
from tailored_llama.errors import InputError
from tailored_llama.pipeline import parts_of, place_report, report_target
from tailored_llama.store import ArtifactRef, ArtifactStore

PAGES = {  # reports that the UI shows, by stage: the Markdown file, the artifact's key, and a few words about it
    "report": ("report", "recovery", "What was kept and what was lost"),
    "sweep": ("sweep", "sweep", "Every setting, and the curves"),
    "transfer": ("transfer", "transfer", "Each adapter on every benchmark"),
    "smallest": ("smallest", "smallest", "The smallest model, and the proof"),
    "prompt-study": ("study", "prompt-study", "Chosen prompts and references"),
}
LIMIT = 100_000  # bytes per artifact, which the server keeps in its database
_ROWS = 400  # stages shown at most; they always fit
_SHOWN_KEY = 12  # characters of a key, enough to identify an artifact
_UNBROKEN = str.maketrans({" ": "\N{NO-BREAK SPACE}", "-": "\N{NON-BREAKING HYPHEN}"})  # keeps a cell on one line


def show_report(store: ArtifactStore, ref: ArtifactRef) -> None:
    """Show a report's Markdown files as artifacts of this run, with a table of the stages behind the report."""
    folder = store.folder(ref.stage, ref.key)
    page, key, about = PAGES[ref.stage]

    text = (folder / f"{page}.md").read_text(encoding="utf-8")
    whole = f"\nThe whole report:\n\n```\n{_location(store, ref)}/{page}.html\n```\n"
    _show(key, about, with_pictures(text + whole, folder))
    _show("stages", "Time, memory and place of each", stages_page(store, ref))


def keep_report(store: StoreConfig, report: ArtifactRef, name: str) -> None:
    """Copy the report of a deployment's run to `store.reports`, and show the page of all runs that lie there."""
    try:
        target = report_target(store, name)
    except InputError as error:
        get_run_logger().warning("the report was not copied: %s", error)
        return
    place_report(ArtifactStore(store.root).open(report), target)
    if target:
        _show("runs", "All runs, newest first", f"# All runs\n\n{reports.write_index(target.parent)}\n")


def _show(key: str, about: str, text: str) -> None:
    try:
        if text:
            create_markdown_artifact(text, key, about)
    except Exception as error:  # a server that cannot take a copy of the report must not fail the run
        get_run_logger().warning("artifact %s is not shown: %s", key, error)


def with_pictures(text: str, folder: Path, limit: int = LIMIT) -> str:
    """A Markdown text with its PNG files embedded; those that would make it too long are given by path."""
    room = limit - len(text.encode())

    def embed(match: re.Match[str]) -> str:
        nonlocal room
        path = folder / match[2]
        if not path.is_file():
            return match[0]
        data = base64.b64encode(path.read_bytes()).decode()
        if len(data) > room:
            return f"{match[1]}: `{path}`"
        room -= len(data)
        return f"![{match[1]}](data:image/png;base64,{data})"

    return re.sub(r"!\[([^]]*)\]\(([^):/]+\.png)\)", embed, text)


def stages_page(store: ArtifactStore, ref: ArtifactRef) -> str:
    """A Markdown table of an artifact and all that it was made from, in the order they were made."""
    context = FlowRunContext.get()
    begun = context.start_time.timestamp() if context else math.inf
    parts, rows = parts_of(store, ref), []
    for part in parts:
        manifest = part.manifest
        when = "in this run" if part.time >= begun else f"{datetime.fromtimestamp(part.time, UTC):%Y-%m-%d}"
        costs = [f"{manifest.seconds:,.1f} s", f"{manifest.peak_memory_bytes / 1e9:.2f} GB"]
        cells = [part.label, *(cell.translate(_UNBROKEN) for cell in (when, *costs))]
        rows.append(f"| {manifest.stage} | {' | '.join(cells)} | `{manifest.stage}/{manifest.key[:_SHOWN_KEY]}*` |")
    lines = ["# Stages", ""]
    if left := max(0, len(rows) - _ROWS):
        lines += [f"The {left:,} oldest are not shown.", ""]
    lines += [
        "| stage | of | computed | time | peak memory | artifact |",
        "|:--|:--|:--|--:|--:|:--|",
        *rows[left:],
        "",
    ]
    return "\n".join([*lines, f"Artifacts are folders of `{store.root}`; * stands for the rest of the key.", ""])


def _location(store: ArtifactStore, ref: ArtifactRef) -> str:
    if "://" in store.root:
        return f"{store.root.rstrip('/')}/{ref.stage}/{ref.key}"
    return str(store.folder(ref.stage, ref.key))
