"""Prefect's API, asked for while the libraries load: its temporary server and torch both take seconds to start."""

from __future__ import annotations

import contextlib
import signal
import sys
from threading import Thread

from prefect.client.orchestration import get_client


def reach_server() -> Thread:
    """Connect in the background; where PREFECT_API_URL names no server, Prefect starts a temporary one.

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
