"""The progress of a long stage: a bar in the terminal, and a progress artifact in the Prefect UI."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.context import TaskRunContext

from tailored_llama.console import progress_bar
from tailored_llama.progress import Progress

EVERY = 5.0  # seconds between updates and before the first; a shorter stage needs none
LAST_WORD = 2.0  # seconds that a stage waits at its end for a slow server
KEY = "under-way"  # the same for all stages: the UI's artifact page shows the latest


@contextmanager
def stage_progress(description: str) -> Iterator[Progress]:
    """Show a stage's progress in the terminal and, within a task run, in the UI.

    Errors of the server do not affect the stage; a server that hangs delays it once, by two seconds. The artifact is
    deleted when the stage succeeds: a finished run shows its results, not 30 full bars. The artifact of a failed stage
    stays and shows how far it came.
    """
    with progress_bar(description) as bar:
        if TaskRunContext.get() is None:
            yield bar
            return
        reporter = _Reporter(description)

        def show(done: int, total: int) -> None:
            bar(done, total)
            reporter.reach(done, total)  # begins at the first unit of work: a stage whose artifact is found has none

        try:
            yield show
            reporter.done = True
        finally:
            reporter.end()


class _Reporter:
    """Report to the server from a separate thread, so that a slow or hanging server does not hold up the stage."""

    def __init__(self, description: str) -> None:
        self.description, self.done = description, False
        self._at = self._reported = (0, 0)
        self._ended = Event()
        self._artifact: UUID | None = None
        run = contextvars.copy_context().run  # the artifact belongs to this task run
        self._thread = Thread(target=run, args=(self._report_until_end,), daemon=True)

    def reach(self, done: int, total: int) -> None:
        self._at = (done, total)
        if self._thread.ident is None:
            self._thread.start()

    def end(self) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(LAST_WORD)  # a run that ends would cut off the update

    def _report_until_end(self) -> None:
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
        if (at := self._at) == self._reported:
            return
        (done, total), self._reported = at, at
        share, text = 100 * min(1.0, done / max(1, total)), f"{self.description}: {done:,} of {total:,}"
        if self._artifact is None:
            self._artifact = cast(UUID, create_progress_artifact(share, KEY, text))
        else:
            update_progress_artifact(self._artifact, share, text)
