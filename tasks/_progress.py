"""How far a long stage is: a bar at the terminal, and a progress artifact in the Prefect UI."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.context import TaskRunContext

from tailored_llama.console import progress_bar
from tailored_llama.progress import Progress

EVERY = 5.0  # seconds between two updates, and before the first: what is done sooner needs none
LAST_WORD = 2.0  # seconds that a stage waits, at its end, for a server that is slow
KEY = "under-way"  # the same for all: the UI's page of artifacts shows the latest


@contextmanager
def stage_progress(description: str) -> Iterator[Progress]:
    """Say where a stage is, at the terminal and, within a task run, in the UI.

    What happens there cannot harm it; where the server hangs, it costs two seconds, once. The artifact goes when the
    stage is done: a finished run shows what it found, not 30 bars at their end. That of a stage that fails stays, and
    says how far it came.
    """
    with progress_bar(description) as bar:
        if TaskRunContext.get() is None:
            yield bar
            return
        teller = _Teller(description)

        def show(done: int, total: int) -> None:
            bar(done, total)
            teller.at = (done, total)
            teller.begin()  # with the first unit of work: a stage whose artifact is found has no progress

        try:
            yield show
            teller.done = True
        finally:
            teller.end()


class _Teller:
    """Tells the server from a thread of its own, so that one that is slow or hangs does not hold up the stage."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.at = (0, 0)
        self.done = False
        self._ended = Event()
        self._artifact: UUID | None = None
        self._told = (0, 0)
        self._thread: Thread | None = None

    def begin(self) -> None:
        if self._thread is None:
            run = contextvars.copy_context().run  # the artifact belongs to this task run
            self._thread = Thread(target=run, args=(self._tell,), daemon=True)
            self._thread.start()

    def end(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(LAST_WORD)  # the end of the run would cut off what is being said

    def _tell(self) -> None:
        with suppress(Exception), get_client(sync_client=True) as client:
            while not self._ended.wait(EVERY):
                try:
                    self._post()
                except Exception as error:
                    logging.getLogger(__name__).debug("no progress shown: %s", error)
            if self._artifact is None:
                return
            if self.done:
                client.delete_artifact(self._artifact)
            else:
                self._post()

    def _post(self) -> None:
        if (at := self.at) == self._told:
            return
        (done, total), self._told = at, at
        share, text = 100 * min(1.0, done / max(1, total)), f"{self.description}: {done:,} of {total:,}"
        if self._artifact is None:
            self._artifact = create_progress_artifact(share, KEY, text)
        else:
            update_progress_artifact(self._artifact, share, text)
