"""Artifacts behind a URL: fetched whole or not at all, and published once. All raise errors as in `remote`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tailored_llama.errors import InputError, one_line
from tailored_llama.store import manifests, remote
from tailored_llama.store.manifests import MANIFEST, ArtifactRef
from tailored_llama.store.remote import Remote


def fetch(at: Remote, stage: str, key: str, content: bytes, folder: Path, stamps: Path) -> str | None:
    """Copy an artifact with this manifest from the URL into a new folder and check it; return its problem, or None.

    The copied manifest keeps the time at which the artifact was published.
    """
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_bytes(content)
    try:
        manifest = manifests.read_manifest(folder)
        manifests.check_identity(manifest, stage, key)
    except InputError as error:
        return str(error)
    try:
        remote.pull(at, f"{stage}/{key}", list(manifest.files), folder)
        written = remote.written(at, f"{stage}/{key}/{MANIFEST}")
    except FileNotFoundError as error:
        return f"{one_line(error)} is missing"
    os.utime(folder / MANIFEST, (written, written))
    return manifests.check(folder, stage, key, stamps)


def publish(at: Remote, folder: Path, ref: ArtifactRef, is_lost: Callable[[], bool]) -> bool:
    """Push an artifact that is not at the URL; return False if another machine published one first.

    Between two files, `is_lost` tells whether the claim to it is lost; then another machine may be pushing, and this
    one ends.
    """
    target = f"{ref.stage}/{ref.key}"
    for name in manifests.read_manifest(folder).files:
        if is_lost():
            return False
        remote.push(at, folder, target, name)
    manifest = (folder / MANIFEST).read_bytes()  # the last: it makes the artifact
    return remote.create(at, f"{target}/{MANIFEST}", manifest, f"pushing {target}")
