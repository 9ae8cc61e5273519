"""Artifacts behind a URL: fetched whole or not at all, and published once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tailored_llama.errors import InputError, one_line
from tailored_llama.store import manifests, remote
from tailored_llama.store.manifests import MANIFEST, ArtifactRef, Manifest
from tailored_llama.store.remote import Remote
from tailored_llama.store.verifying import Stamps, check


def published(at: Remote, stage: str, key: str) -> Manifest | None:
    """The manifest at the URL; None if there is none, or it cannot be parsed."""
    name = f"{stage}/{key}/{MANIFEST}"
    content = remote.read(at, [name]).get(name)
    try:
        return None if content is None else manifests.parse_manifest(content, name)
    except InputError:
        return None


def fetch(at: Remote, stage: str, key: str, folder: Path) -> tuple[str | None, Stamps | None]:
    """Copy an artifact from the URL into an empty folder and verify it; return its problem or its files' stamps.

    The copied manifest keeps the time at which the artifact was published.

    Raises:
        InputError, UnreachableError: as `remote.pull`.
    """
    source = f"{stage}/{key}"
    try:
        remote.pull(at, source, [MANIFEST], folder)
        try:
            manifest = manifests.read_manifest(folder)
            manifests.check_identity(manifest, stage, key)
        except InputError as error:
            return str(error), None
        remote.pull(at, source, list(manifest.files), folder)
        written = remote.written(at, f"{source}/{MANIFEST}")
        os.utime(folder / MANIFEST, (written, written))
    except FileNotFoundError as error:
        return f"{one_line(error)} is missing", None
    return check(folder, stage, key, None)


def publish(at: Remote, folder: Path, ref: ArtifactRef, is_lost: Callable[[], bool]) -> bool:
    """Push an artifact that is not at the URL; return False if another machine published one first.

    Between two files, `is_lost` tells whether the claim to it is lost; then another machine may be pushing, and this
    one ends.

    Raises:
        InputError, UnreachableError: as `remote.push`.
    """
    target = f"{ref.stage}/{ref.key}"
    for name in manifests.read_manifest(folder).files:
        if is_lost():
            return False
        remote.push(at, folder, target, name)
    manifest = (folder / MANIFEST).read_bytes()  # the last: it makes the artifact
    return remote.create(at, f"{target}/{MANIFEST}", manifest, f"pushing {target}")


def withdraw(at: Remote, stage: str, key: str, fetched: Path) -> None:
    """Remove the manifest of a broken artifact from the URL, with the claim to it, so that it is no artifact.

    It is left if it is no longer the one that was fetched: this machine may have stalled, and another one published.
    """
    name, manifest = f"{stage}/{key}/{MANIFEST}", fetched / MANIFEST
    if manifest.is_file() and remote.read(at, [name]).get(name) == manifest.read_bytes():
        remote.remove_files(at, [name])
