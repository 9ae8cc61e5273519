"""One temporary Prefect server for all tests of flows, and reports whose pictures are blank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from tailored_llama.reports.figures import Picture


@pytest.fixture(scope="session", autouse=True)
def _server() -> Iterator[None]:
    # Every flow run waits a third of a second for the thread that sends its heartbeats.
    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
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
