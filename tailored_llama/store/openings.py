"""The record of how often the rows that prove a goal have been opened.

Whoever looks at the same rows again, with another plan, has another chance to be lucky. So every plan that opens them
is recorded in the store, before the rows are scored, as a small file `.openings/GOAL.NUMBER`. It is created only where
none is, and nothing removes it.
"""

from __future__ import annotations

from itertools import count

from fsspec.implementations.local import LocalFileSystem

from tailored_llama.store import remote
from tailored_llama.store.artifacts import ArtifactStore

OPENINGS = ".openings"


def record_opening(store: ArtifactStore, goal: str, plan: str) -> int:
    """Record that a plan opens the rows of a goal, and return the number of the opening, from 1.

    The goal identifies the rows, and what is proven with them; the plan, what is to be tested, and how. The same plan
    opens the rows only once, however often it runs.

    Raises:
        InputError, UnreachableError, OSError: the store cannot be read or written.
    """
    at = store.remote or remote.Remote(store.root, LocalFileSystem(), str(store.local))
    for number in count(1):
        if remote.create(at, f"{OPENINGS}/{goal}.{number}", plan.encode(), "recording an opening"):
            return number
    raise AssertionError
