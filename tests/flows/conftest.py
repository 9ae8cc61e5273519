"""One temporary Prefect server for all tests of flows, which records no task runs; reports have blank pictures."""

import contextlib
from collections.abc import Iterator

import pytest

from lean import lean_server
from pictures import blank_pictures
from tailored_llama.pipeline import STAGES
from tasks.executor import _task


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


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The names of the states that the stages of runs succeed with, by the name of their task runs."""
    seen: dict[str, list[str]] = {}
    for name in STAGES:
        hook = lambda task, run, state: seen.setdefault(run.name, []).append(state.name)  # noqa: E731
        monkeypatch.setattr(_task(name), "on_completion_hooks", [hook])
    return seen


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are tried again at once."""
    for name in STAGES:
        monkeypatch.setattr(_task(name), "retry_delay_seconds", [0] * 3)
