"""What an artifact was made from, and what that took: in this run, and in the runs before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    return sorted(_parts(store, ref), key=lambda part: part.time)


def _parts(store: ArtifactStore, ref: ArtifactRef) -> Iterator[Part]:
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
        yield Part(time, " ".join([*words, *(name for name in named if name not in words)]), manifest)
        for name, used in manifest.inputs.items():
            if used.key not in seen:
                seen.add(used.key)
                waiting.append((name, used))


def costs_of(parts: Iterable[Part], begun: float) -> str:
    """What was computed since a run has begun, and what was found, with their times."""
    new: list[Manifest] = []
    old: list[Manifest] = []
    for part in parts:
        (new if part.time >= begun else old).append(part.manifest)
    costs = f"{len(new)} computed in this run, in {_time(new)}"
    return f"{costs}; {len(old)} found in the store, which took {_time(old)} to compute" if old else costs


def _time(manifests: Iterable[Manifest]) -> str:
    minutes, seconds = divmod(round(sum(manifest.seconds for manifest in manifests)), 60)
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
