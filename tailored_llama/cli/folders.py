"""Outputs of the commands: they appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tailored_llama.errors import InputError
from tailored_llama.store import NO_ROOM, error_number


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name only after everything in it is written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; allowed: a new or empty folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; allowed: a path in a writable folder") from None
    with room_for(out), scratch:
        folder = Path(scratch.name) / "new"
        folder.mkdir()
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)


@contextmanager
def room_for(out: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an InputError."""
    try:
        yield
    except Exception as error:
        if (number := error_number(error)) not in NO_ROOM:
            raise
        raise InputError(f"{out}: {os.strerror(number)}; allowed: a writable folder with room") from error


def check_new_file(file: Path) -> None:
    """Refuse a file that exists, or whose folder does not."""
    if file.exists() or not file.parent.is_dir():
        raise InputError(f"{file}: {'exists' if file.exists() else 'its folder is missing'}; allowed: a new file")


def checkpoint_folder(path: Path | None) -> Path | None:
    """Refuse a folder that is no checkpoint, before torch is imported: that takes seconds."""
    if path is not None and not (path / "config.json").is_file():
        raise InputError(f"{path / 'config.json'}: missing; allowed: a checkpoint folder")
    return path
