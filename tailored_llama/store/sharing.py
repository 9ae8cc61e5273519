"""Artifacts behind a URL: fetched whole or not at all, and published once. All raise errors as in `remote`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tailored_llama.errors import InputError, one_line
from tailored_llama.store import manifests, remote
from tailored_llama.store.manifests import MANIFEST, ArtifactRef, Manifest
from tailored_llama.store.remote import Remote


def published(at: Remote, stage: str, key: str) -> Manifest | None:
    """The manifest at the URL; None if there is none, or it cannot be parsed."""
    name = f"{stage}/{key}/{MANIFEST}"
    content = remote.read(at, [name]).get(name)
    try:
        return None if content is None else manifests.parse_manifest(content, name)
    except InputError:
        return None


def fetch(at: Remote, stage: str, key: str, folder: Path, stamps: Path) -> str | None:
    """Copy an artifact from the URL into a new folder and verify it, as `check`; return its problem, or None.

    The copied manifest keeps the time at which the artifact was published.
    """
    source = f"{stage}/{key}"
    if (written := remote.written(at, f"{source}/{MANIFEST}")) is None:
        return f"{MANIFEST} is missing"
    try:
        remote.pull(at, source, [MANIFEST], folder)
        try:
            manifest = manifests.read_manifest(folder)
            manifests.check_identity(manifest, stage, key)
        except InputError as error:
            return str(error)
        remote.pull(at, source, list(manifest.files), folder)
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


def withdraw(at: Remote, stage: str, key: str, fetched: Path) -> None:
    """Remove the manifest of a broken artifact from the URL, with the claim to it, so that it is no artifact.

    It is left if it is no longer the one that was fetched: this machine may have stalled, and another one published.
    """
    name, manifest = f"{stage}/{key}/{MANIFEST}", fetched / MANIFEST
    if manifest.is_file() and remote.read(at, [name]).get(name) == manifest.read_bytes():
        remote.remove_files(at, [name])
