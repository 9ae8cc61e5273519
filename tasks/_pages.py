"""What a run shows in the Prefect UI beside its tasks: Markdown artifacts, with their pictures inside them."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext

from tailored_llama.artifacts import MANIFEST, ArtifactRef, ArtifactStore, Manifest, read_manifest
from tailored_llama.errors import InputError

LIMIT = 100_000  # bytes of an artifact: the server keeps them all in its database
_ROWS = 400  # of stages: what surely fits
_SHOWN_KEY = 12  # characters of a key that tell artifacts apart
_UNBROKEN = str.maketrans({" ": "\N{NO-BREAK SPACE}", "-": "\N{NON-BREAKING HYPHEN}"})  # so that a cell is one line


def show_report(store: ArtifactStore, ref: ArtifactRef, page: str, key: str, about: str) -> None:
    """Show the Markdown files of a report as artifacts of this run, and beside them what the report was made of.

    Args:
        store: where the report is.
        ref: the report.
        page: its page for people, without the ending; the Markdown file of that name is shown with its place.
        key: of that artifact.
        about: what is in it: few words, as the UI cuts them.
    """
    folder = store.folder(ref.stage, ref.key)

    def read(name: str, more: str = "") -> str:
        file = folder / f"{name}.md"
        return with_pictures(file.read_text(encoding="utf-8") + more, folder) if file.is_file() else ""

    _show(key, about, read(page, f"\nThe whole report:\n\n```\n{_place(store, ref)}/{page}.html\n```\n"))
    _show("plots", "Widths, importance, loss curves", read("plots"))
    _show("stages", "Time, memory and place of each", stages_page(store, ref))


def _show(key: str, about: str, text: str) -> None:
    try:
        if text:
            create_markdown_artifact(text, key, about)
    except Exception as error:  # the report is there: a server that cannot take its copy must not cost the run
        get_run_logger().warning("artifact %s is not shown: %s", key, error)


def with_pictures(text: str, folder: Path, limit: int = LIMIT) -> str:
    """A Markdown text whose PNG files stand in it; of those that would make it too long, the place."""
    room = limit - len(text.encode())

    def inside(found: re.Match[str]) -> str:
        nonlocal room
        path = folder / found[2]
        if not path.is_file():
            return found[0]
        data = base64.b64encode(path.read_bytes()).decode()
        if len(data) > room:
            return f"{found[1]}: `{path}`"
        room -= len(data)
        return f"![{found[1]}](data:image/png;base64,{data})"

    return re.sub(r"!\[([^]]*)\]\(([^):/]+\.png)\)", inside, text)


def stages_page(store: ArtifactStore, ref: ArtifactRef) -> str:
    """All artifacts that one was made of, itself included, in the order they were made, as a Markdown table."""
    context = FlowRunContext.get()
    begun = context.start_time.timestamp() if context else math.inf
    new, old, rows = [], [], []
    for time, label, part in sorted(_parts(store, ref), key=lambda found: found[0]):
        (new if time >= begun else old).append(part)
        when = "in this run" if time >= begun else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d}"
        costs = [f"{part.seconds:,.1f} s", f"{part.peak_memory_bytes / 1e9:.2f} GB"]
        cells = [label, *(cell.translate(_UNBROKEN) for cell in (when, *costs))]
        rows.append(f"| {part.stage} | {' | '.join(cells)} | `{part.stage}/{part.key[:_SHOWN_KEY]}*` |")
    head = f"{len(new)} computed in this run, in {_seconds(new)}"
    head += f"; {len(old)} found, which had taken {_seconds(old)}." if old else "."
    lines = ["# Stages", "", head, ""]
    if left := max(0, len(rows) - _ROWS):
        lines += [f"The {left:,} oldest are not shown.", ""]
    lines += [
        "| stage | of | computed | time | peak memory | artifact |",
        "|:--|:--|:--|--:|--:|:--|",
        *rows[left:],
        "",
    ]
    return "\n".join([*lines, f"Artifacts are folders of `{store.root}`; the asterisk is the rest of the key.", ""])


def _parts(store: ArtifactStore, ref: ArtifactRef) -> Iterator[tuple[float, str, Manifest]]:
    """Of an artifact and all it was made of, as far as at hand: when it was published, what of, and its manifest."""
    seen, waiting = {ref.key}, [("", ref)]
    while waiting:
        label, part = waiting.pop(0)
        folder = store.folder(part.stage, part.key)
        try:
            time, manifest = (folder / MANIFEST).stat().st_mtime, read_manifest(folder)
        except (OSError, InputError):
            continue
        words = label.removeprefix(part.stage).split()
        named = [str(manifest.config[name]) for name in ("benchmark", "split") if name in manifest.config]
        yield time, " ".join([*words, *(name for name in named if name not in words)]), manifest
        for name, used in manifest.inputs.items():
            if used.key not in seen:
                seen.add(used.key)
                waiting.append((name, used))


def _place(store: ArtifactStore, ref: ArtifactRef) -> str:
    if "://" in store.root:
        return f"{store.root.rstrip('/')}/{ref.stage}/{ref.key}"
    return str(store.folder(ref.stage, ref.key))


def _seconds(parts: list[Manifest]) -> str:
    minutes, seconds = divmod(round(sum(part.seconds for part in parts)), 60)
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
