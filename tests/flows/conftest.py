"""One temporary Prefect server for all tests of flows, which records no task runs; reports have blank pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from lean import lean_server
from pictures import blank_pictures


@pytest.fixture(scope="session", autouse=True)
def _server() -> Iterator[None]:
    with lean_server():
        yield


@pytest.fixture
def drawn() -> None:
    """Pictures are drawn."""


@pytest.fixture(autouse=True)
def _blank_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    with contextlib.nullcontext() if "drawn" in request.fixturenames else blank_pictures():
        yield
