"""One temporary Prefect server for all tests of flows, which records no task runs; reports have blank pictures.

Workers are threads here: each does what the flow `stage` does, with a deployment's arguments, as JSON.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from contextvars import Context
from threading import Thread
from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Failed, Scheduled, State

import tasks._dispatch
import tasks.executor
from flows.compositions import stage
from lean import lean_server
from pictures import blank_pictures
from tailored_llama.pipeline import STAGES, flatten
from tailored_llama.pipeline.executor import ALONE
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


class Names(list[str]):
    """The nodes that workers were asked for, and the runs in which they were."""

    runs: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.runs = []


Workers = Callable[..., Names]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """Start workers that call a function before each stage; returns the names of the stages that they have run.

    Two threads cannot load models at once, as processes can: they take turns, with the flow's own stages too.
    """

    def start(before: Callable[[str], None] = lambda name: None, at_once: int | None = None) -> Names:
        names = Names()

        def run(deployment: str, parameters: dict[str, Any], flow_run_name: str, timeout: int) -> FlowRun:
            assert (deployment, timeout) == ("stage/pool", 0)
            with get_client(sync_client=True) as client:
                begun = client.create_flow_run(stage, parameters=parameters, name=flow_run_name, state=Scheduled())

            def end() -> None:
                state = work(parameters, flow_run_name)
                with get_client(sync_client=True) as client:
                    client.set_flow_run_state(begun.id, state, force=True)

            Thread(target=end, daemon=True).start()
            return begun

        def work(parameters: dict[str, Any], flow_run_name: str) -> State[Any]:
            names.runs.append(flow_run_name.rpartition(", ")[0])
            errors, lost = list[str](), set[int]()
            for number, call in enumerate(calls := parameters["calls"]):
                names.append(call["name"])
                try:
                    if lost & {position for _, position in flatten(call["inputs"]) if isinstance(position, int)}:
                        raise RuntimeError("what it reads is not there")
                    before(call["name"])
                    until = [own for position, own in enumerate(calls[: number + 1]) if position not in lost]
                    given = stage.validate_parameters(json.loads(json.dumps(parameters | {"calls": until})))
                    with ALONE:
                        Context().run(stage.fn, **given)
                except RuntimeError as error:
                    lost.add(number)
                    errors.append(str(error))
            return Failed(message="; ".join(errors)) if errors else Completed()

        monkeypatch.setattr(tasks.executor, "pool_limit", lambda deployment: at_once)
        monkeypatch.setattr(tasks._dispatch, "run_deployment", run)
        return names

    return start
