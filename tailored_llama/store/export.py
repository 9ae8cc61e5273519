"""Export of finished models: copies of artifacts under readable folder names."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tailored_llama.errors import InputError
from tailored_llama.store.manifests import FINISHED, read_manifest


def check_target(target: Path) -> None:
    """Check that an export folder does not exist, or holds a finished model, which may be replaced.

    Raises:
        InputError: it holds something else.
    """
    if not target.exists():
        return
    try:
        stage = read_manifest(target).stage
    except InputError:
        stage = ""
    if stage != FINISHED:
        raise InputError(f"store.export: {target} is not an exported model; allowed: a new folder, or one to replace")


def place(artifact: Path, target: Path) -> None:
    """Copy a finished model to its export folder, whole or not at all; an earlier export is replaced.

    Raises:
        InputError: the folder holds something else, cannot be written, or the disk is full.
    """
    check_target(target)
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
        raise InputError(f"store.export: {target}: {error}; allowed: a writable folder with room") from None
