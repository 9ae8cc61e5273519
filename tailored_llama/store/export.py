"""Artifacts copied to folders with names for people: finished models, and the newest reports."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tailored_llama.errors import InputError
from tailored_llama.store.manifests import read_manifest


def check_target(target: Path, field: str, what: str, stages: Sequence[str]) -> None:
    """Check that a folder is new, or holds an artifact of some stages, which may be replaced.

    The error message names the field of the configuration, and what is looked for there, such as "a report".

    Raises:
        InputError: something else stands there.
    """
    if not target.exists():
        return
    try:
        stage = read_manifest(target).stage
    except InputError:
        stage = ""
    if stage not in stages:
        raise InputError(f"{field}: {target} is not {what}; allowed: a new folder, or one to replace")


def place(artifact: Path, target: Path, field: str, what: str, stages: Sequence[str]) -> None:
    """Copy an artifact to a folder with a name for people, whole or not at all; an earlier copy is replaced.

    Raises:
        InputError: as `check_target`; or there is no room.
    """
    check_target(target, field, what, stages)
    if target.exists() and read_manifest(target).digest == read_manifest(artifact).digest:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            new = shutil.copytree(artifact, Path(scratch) / "new")
            if target.exists():
                target.rename(Path(scratch) / "old")
            new.rename(target)
    except OSError as error:
        raise InputError(f"{field}: {target}: {error}; allowed: a writable folder with room") from None
