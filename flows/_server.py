"""Prefect's API around a flow of the command line: reached while the libraries load, and left when the run is over."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from threading import Thread, Timer

from prefect.client.orchestration import get_client

LAST_WORDS = 60.0  # seconds for what Prefect still has to tell its server when a run is over


def reach_server() -> Thread:
    """Connect in the background; where PREFECT_API_URL names no server, Prefect starts a temporary one.

    That takes seconds, as torch does.

    Join the thread before a flow runs. A failure is not reported here: the flow meets it again, and says it.
    """
    # Once Prefect has noted a SIGTERM, this handler has it: the signal's own way to end a process would end it without
    # what Python does at exit, and leave the temporary server behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    def connect() -> None:
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:
            client.hello()

    thread = Thread(target=connect, daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """End the process a minute after the block, which ends in `sys.exit`, at the latest.

    Prefect keeps it until every event of the run has been told, and tries each for two minutes: a server that hangs
    would keep a run that is over for hours.
    """
    status: object = 1
    try:
        yield
    except SystemExit as end:
        status = end.code or 0
        raise
    finally:
        timer = Timer(LAST_WORDS, _leave, (status if isinstance(status, int) else 1,))
        timer.daemon = True
        timer.start()


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
