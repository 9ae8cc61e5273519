"""What an artifact was made from, in this run and in the runs before it."""

from __future__ import annotations

from dataclasses import dataclass

from tailored_llama.errors import InputError
from tailored_llama.store import MANIFEST, ArtifactRef, ArtifactStore, Manifest, read_manifest


@dataclass(frozen=True)
class Part:
    """One of the artifacts behind another: when it was published, in seconds since 1970, and what it is of."""

    time: float
    label: str
    manifest: Manifest


def parts_of(store: ArtifactStore, ref: ArtifactRef) -> list[Part]:
    """An artifact and all that it was made from, as far as stored here, in the order they were made."""
    parts, seen, waiting = list[Part](), {ref.key}, [("", ref)]
    while waiting:
        label, part = waiting.pop(0)
        folder = store.folder(part.stage, part.key)
        try:
            time, manifest = (folder / MANIFEST).stat().st_mtime, read_manifest(folder)
        except (OSError, InputError):
            continue
        words = label.removeprefix(part.stage).split()
        named = [str(manifest.config[name]) for name in ("benchmark", "split") if name in manifest.config]
        parts.append(Part(time, " ".join([*words, *(name for name in named if name not in words)]), manifest))
        for name, used in manifest.inputs.items():
            if used.key not in seen:
                seen.add(used.key)
                waiting.append((name, used))
    return sorted(parts, key=lambda part: part.time)
