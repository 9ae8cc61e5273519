"""What tests of flows go without: a record of task runs and events, which nothing looks at, and pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

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

from tailored_llama.reports.figures import Picture

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


@contextlib.contextmanager
def blank_pictures() -> Iterator[None]:
    """Reports without pictures: drawing is most of their time, and tests/library/reports tests what pictures show."""
    blank = {
        "__post_init__": lambda self: None,
        "__html__": lambda self: "<svg></svg>",
        "save_png": lambda self, path: path.write_bytes(b""),
    }
    with mock.patch.multiple(Picture, **blank):
        yield
