"""The record of openings: every plan that looked at the rows that prove a goal.

Whoever looks at the same rows again, with another plan, has another chance to be lucky. The rows are the user's and not
a store's. So the record is kept twice: in the user's state folder, which knows of all stores, and in the store, which
all its machines share.
"""

import logging
import os
from itertools import count
from pathlib import Path

import platformdirs
from fsspec.implementations.local import LocalFileSystem

from tailored_llama.store import remote
from tailored_llama.store.artifacts import ArtifactStore

log = logging.getLogger(__name__)


def state_folder() -> Path:
    """The user's state folder, such as ~/.local/state/tailored-llama; OSError: it cannot be written."""
    try:
        folder = platformdirs.user_state_path("tailored-llama")
    except RuntimeError as error:  # a user without a home folder, as in some containers
        raise FileNotFoundError(str(error)) from None
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder}: not writable")
    return folder


def record_opening(store: ArtifactStore, goal: str, plan: str) -> tuple[int, str]:
    """Record that a plan opens the rows that prove a goal, before they are scored.

    A plan has a small file `.openings/GOAL.NUMBER` in both records, created only where none is, which nothing removes.
    Its number, from 1, is the first at which no other plan stands in either. The goal identifies the rows, and what is
    proven with them; the plan, what is to be tested, and how. Returns the number, and where the record was kept.
    """
    shared = store.remote or remote.Remote(store.root, LocalFileSystem(), str(store.local))
    records, kept, action = [shared], "the store", "recording an opening"
    try:
        folder = str(state_folder())
    except OSError as error:  # as in many containers
        log.warning("the opening of the proving rows is recorded in the store alone: %s", error)
    else:
        records.insert(0, remote.Remote(folder, LocalFileSystem(), folder))
        kept += " and the user's state folder"
        # A plan that only the store has recorded keeps its number.
        names = [f".openings/{name}" for name in remote.names(shared, ".openings") if name.startswith(f"{goal}.")]
        for name, content in remote.read_all(shared, names).items():
            remote.create(records[0], name, content, action)
    for number in count(1):
        name = f".openings/{goal}.{number}"
        if all(remote.create(record, name, plan.encode(), action) for record in records):
            break
    return number, kept
