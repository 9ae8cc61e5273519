"""What a run shows in the Prefect UI beside its tasks: Markdown artifacts, with their pictures inside them."""

from __future__ import annotations

import base64
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
_SHOWN_KEY = 12  # characters of a key that tell artifacts apart


def show_report(store: ArtifactStore, ref: ArtifactRef, page: str, key: str, about: str) -> None:
    """Show the Markdown files of a report as artifacts of this run, and beside them what the report was made of.

    Args:
        store: where the report is.
        ref: the report.
        page: its page for people, without the ending; the Markdown file of that name is shown with its place.
        key: of that artifact.
        about: what is in it, in words.
    """
    folder = store.folder(ref.stage, ref.key)

    def read(name: str) -> str:
        file = folder / f"{name}.md"
        return with_pictures(file.read_text(encoding="utf-8"), folder) if file.is_file() else ""

    place = f"\nThe whole report:\n\n```\n{_place(store, ref)}/{page}.html\n```\n"
    _show(key, about, read(page) + place)
    _show("plots", "What pruning kept, what was important, how tuning went.", read("plots"))
    _show("stages", "Every stage: computed or found, time, memory, and where its artifact is.", stages_page(store, ref))


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
        data = base64.b64encode(path.read_bytes()).decode()
        if len(data) > room:
            return f"{found[1]}: `{path}`"
        room -= len(data)
        return f"![{found[1]}](data:image/png;base64,{data})"

    return re.sub(r"!\[([^]]*)\]\(([^):/]+\.png)\)", inside, text)


def stages_page(store: ArtifactStore, ref: ArtifactRef) -> str:
    """All artifacts that one was made of, itself included, in the order they were made, as a Markdown table."""
    context = FlowRunContext.get()
    begun = context.start_time.timestamp() if context else None
    made = []
    for label, part in _parts(store, ref):
        file = store.folder(part.stage, part.key) / MANIFEST
        made.append((file.stat().st_mtime, label, part))
    made.sort(key=lambda one: one[0])
    new = [part for time, _, part in made if begun is not None and time >= begun]
    old = [part for _, _, part in made if part not in new]
    head = (
        f"{len(new)} stages computed in this run ({_seconds(new)}), {len(old)} found ({_seconds(old)} when computed)."
    )
    lines = ["# Stages", "", head, ""]
    lines += ["| stage | of | computed | time | peak memory | artifact |", "|:--|:--|:--|--:|--:|:--|"]
    for time, label, part in made:
        when = "in this run" if part in new else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d}"
        costs = [f"{part.seconds:,.1f} s", f"{part.peak_memory_bytes / 1e9:.2f} GB"]
        cells = [label, *(cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in (when, *costs))]
        lines.append(f"| {part.stage} | {' | '.join(cells)} | `{part.stage}/{part.key[:_SHOWN_KEY]}*` |")
    return "\n".join([*lines, "", f"Artifacts are folders of `{store.root}`; the asterisk is the rest of the key.", ""])


def _parts(store: ArtifactStore, ref: ArtifactRef) -> Iterator[tuple[str, Manifest]]:
    """What an artifact was made of, itself first, and what each is of; an artifact that is not at hand is left out."""
    seen, waiting = {ref.key}, [("", ref)]
    while waiting:
        label, part = waiting.pop(0)
        try:
            manifest = read_manifest(store.folder(part.stage, part.key))
        except InputError:
            continue
        words = label.removeprefix(part.stage).split()
        named = [str(manifest.config[name]) for name in ("benchmark", "split") if name in manifest.config]
        yield " ".join([*words, *(name for name in named if name not in words)]), manifest
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
