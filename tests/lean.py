"""A temporary Prefect server without what tests of flows do not look at: a record of task runs and events."""

import contextlib
from collections.abc import Iterator

from prefect.settings import (
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED,
    PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED,
    PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED,
    PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED,
    PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED,
    temporary_settings,
)
from prefect.testing.utilities import prefect_test_harness

# What a server does with a flow's task runs and events takes half of its time. tests/deployed looks at what it records.
UNUSED = (
    PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED,
    PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED,
    PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED,
    PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED,
    PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED,
)


@contextlib.contextmanager
def lean_server() -> Iterator[None]:
    """A temporary Prefect server."""
    # Every flow run waits a third of a second for the thread that sends its heartbeats.
    lean = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, **dict.fromkeys(UNUSED, False)}
    with temporary_settings(lean), prefect_test_harness(server_startup_timeout=120):
        yield
