"""One temporary Prefect server for all tests of flows, which records no task runs; reports have blank pictures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
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


@pytest.fixture(scope="session", autouse=True)
def _server() -> Iterator[None]:
    # Every flow run waits a third of a second for the thread that sends its heartbeats.
    lean = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, **dict.fromkeys(UNUSED, False)}
    with temporary_settings(lean), prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def drawn() -> None:
    """Pictures are drawn."""


@pytest.fixture(autouse=True)
def _blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of a report's time, and what pictures show is tested in tests/library/reports."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Picture, "__post_init__", lambda self: None)
        monkeypatch.setattr(Picture, "__html__", lambda self: "<svg></svg>")
        monkeypatch.setattr(Picture, "save_png", lambda self, path: path.write_bytes(b""))
