"""One temporary Prefect server for all tests of flows, which records no task runs; reports have blank pictures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lean import lean_server
from tailored_llama.reports.figures import Picture


@pytest.fixture(scope="session", autouse=True)
def _server() -> Iterator[None]:
    with lean_server():
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
