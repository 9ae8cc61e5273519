"""The record of how often the rows that prove a goal have been opened.

Whoever looks at the same rows again, with another plan, has another chance to be lucky. So every plan that opens them
is recorded in the store, before the rows are scored, as a small file `.openings/GOAL.NUMBER`. It is created only where
none is, and nothing removes it.
"""

from __future__ import annotations

import os
import tempfile
from itertools import count
from pathlib import Path

from tailored_llama.store import remote
from tailored_llama.store.artifacts import ArtifactStore

OPENINGS = ".openings"


def record_opening(store: ArtifactStore, goal: str, plan: str) -> int:
    """Record that a plan opens the rows of a goal; the same plan opens them only once, however often it runs.

    Args:
        goal: identifies the rows, and what is proven with them.
        plan: identifies what is to be tested, and how.

    Returns:
        The number of the opening, from 1.

    Raises:
        InputError, UnreachableError, OSError: the store cannot be read or written.
    """
    for number in count(1):
        name = f"{OPENINGS}/{goal}.{number}"
        if _create(store, name, plan.encode()) or _read(store, name) == plan.encode():
            return number
    raise AssertionError


def _create(store: ArtifactStore, name: str, content: bytes) -> bool:
    """Create a file, whole, only where none is."""
    if store.remote:
        return remote.create(store.remote, name, content, "recording an opening")
    path = store.local / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o644)  # whoever shares the store has to know
        try:
            os.link(file.name, path)
        except FileExistsError:
            return False
    return True


def _read(store: ArtifactStore, name: str) -> bytes | None:
    if store.remote:
        return remote.read(store.remote, [name]).get(name)
    return Path(store.local / name).read_bytes()
