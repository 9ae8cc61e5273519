"""Progress artifacts, against a real (temporary) Prefect server."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event
from typing import Any
from uuid import UUID

import pytest
from prefect import flow, runtime, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from tasks import _progress
from tasks._progress import stage_progress


def work(body: Callable[[Any], None], name: str = "tune colours @ 0.2") -> UUID:
    """Run a stage that reports its progress, and return the id of its flow run."""

    @task
    def stage() -> None:
        with stage_progress(name) as progress:
            body(progress)

    @flow
    def run() -> UUID:
        stage()
        return UUID(runtime.flow_run.id)

    return run()


def shown(run: UUID) -> list[Any]:
    """The progress artifacts of a run."""
    only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
    with get_client(sync_client=True) as client:
        return [found for found in client.read_artifacts(artifact_filter=only) if found.type == "progress"]


def until(fulfilled: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not fulfilled() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert fulfilled()


def test_a_long_stage_has_one_artifact_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "EVERY", 0.01)

    def body(progress: Any) -> None:
        this = UUID(runtime.flow_run.id)
        progress(1, 4)
        until(lambda: len(shown(this)) == 1)
        progress(2, 4)
        until(lambda: shown(this)[0].data == 50)
        (artifact,) = shown(this)
        assert artifact.key == "under-way"
        assert artifact.description == "tune colours @ 0.2: 2 of 4"
        assert artifact.task_run_id is not None
        progress(4, 4)

    monkeypatch.setattr(_progress, "LAST_WORD", 60)
    assert shown(work(body)) == []


def test_a_stage_that_fails_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "EVERY", 0.01)
    monkeypatch.setattr(_progress, "LAST_WORD", 60)  # a busy machine may need more than two seconds
    runs: list[UUID] = []

    def body(progress: Any) -> None:
        runs.append(UUID(runtime.flow_run.id))
        progress(1, 4)
        until(lambda: len(shown(runs[0])) == 1)
        progress(3, 4)
        raise FloatingPointError("loss is nan")

    with pytest.raises(FloatingPointError):
        work(body)
    (artifact,) = shown(runs[0])
    assert artifact.description == "tune colours @ 0.2: 3 of 4"


def test_a_stage_that_is_found_or_soon_done_has_none() -> None:
    assert shown(work(lambda progress: None)) == []
    assert shown(work(lambda progress: progress(1, 1))) == []


def test_a_server_that_is_gone_or_hangs_does_not_touch_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "EVERY", 0.01)
    monkeypatch.setattr(_progress, "LAST_WORD", 0.1)
    asked, answered = Event(), Event()

    def gone(*arguments: Any, **named: Any) -> UUID:
        asked.set()
        raise ConnectionError("gone")

    def hangs(*arguments: Any, **named: Any) -> UUID:
        asked.set()
        answered.wait()
        raise ConnectionError("gone at last")

    def body(progress: Any) -> None:
        progress(1, 2)
        assert asked.wait(60)
        progress(2, 2)

    for server in (gone, hangs):
        asked.clear()
        monkeypatch.setattr(_progress, "create_progress_artifact", server)
        assert shown(work(body)) == []
    answered.set()


def test_without_a_run_only_the_terminal_is_told() -> None:
    with stage_progress("tune") as progress:
        progress(1, 2)
