"""Leaving a stage to a worker: its run is created, waited for, and cancelled together with the run that needs it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic_core import to_jsonable_python

from tailored_llama.config import RunConfig
from tailored_llama.errors import InputError

FLOW = "stage"  # in flows/stage.py
THREADS = 64  # stages that one flow has under way at once
EVERY = 1.0  # seconds between two looks at a dispatched run, and one more for each ten stages under way


class CrashedElsewhere(ConnectionError):
    """The worker or the process that ran a stage died; another worker may run it."""


class Cancelled(RuntimeError):
    """The flow was cancelled while one of its stages was under way."""


class Waiting(ThreadPoolTaskRunner[Any]):
    """Prefect's threads, which wait for dispatched stages; all stop waiting when their flow ends or is cancelled."""

    def __init__(self, max_workers: int = THREADS) -> None:
        super().__init__(max_workers)
        self.stopped = Event()
        self.under_way = 0
        self._looked = 0.0

    def cancel_all(self) -> None:
        self.stopped.set()
        super().cancel_all()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    def pause(self, client: SyncPrefectClient, flow_run: UUID) -> None:
        """Wait a moment, longer the more stages are under way.

        Raises:
            Cancelled: the flow has been stopped, or someone asked for it. A worker stops the process of the flow, but
                not before seconds; and nobody stops one that was started from the command line.
        """
        every = EVERY * (1 + self.under_way // 10)
        self.stopped.wait(every)
        if time.monotonic() - self._looked > EVERY:  # one thread asks for all
            self._looked = time.monotonic()
            state = client.read_flow_run(flow_run).state
            if state and (state.is_cancelling() or state.is_cancelled()):
                self.stopped.set()
        self.check()

    def check(self) -> None:
        if self.stopped.is_set():
            raise Cancelled("the run was cancelled")


THREADED: Any = Waiting()  # the runner of flows that dispatch; each run has a copy


def dispatch(config: RunConfig) -> None:
    """Have a worker do what the current task is to do, and wait until it has.

    Raises:
        InputError: there is no such deployment.
        CrashedElsewhere: the worker died.
        Cancelled: the flow was cancelled; so is the worker's run.
        RuntimeError: the worker's run failed.
    """
    flow, task = FlowRunContext.get(), TaskRunContext.get()
    assert flow
    assert flow.flow_run
    assert task
    runner = flow.task_runner
    assert isinstance(runner, Waiting)
    deployment = f"{FLOW}/{config.execution.dispatch}"
    with get_client(sync_client=True) as client, runner.waiting():
        runner.check()
        run = _create(deployment, f"{task.task_run.name}, {config.model.short_name}", task.task.name, task.parameters)
        try:
            while not (run.state and run.state.is_final()):
                runner.pause(client, flow.flow_run.id)
                run = client.read_flow_run(run.id)
        except Cancelled:
            client.set_flow_run_state(run.id, Cancelling(message="The run that dispatched this stage has ended."))
            raise
    if run.state.is_completed():
        return
    message = f"{deployment}: flow run {run.name} ended {run.state.name}: {run.state.message}"
    raise CrashedElsewhere(message) if run.state.is_crashed() else RuntimeError(message)


def _create(deployment: str, name: str, task: str, parameters: dict[str, Any]) -> FlowRun:
    arguments = {key: _plain(value) for key, value in parameters.items()}
    try:
        run: Any = run_deployment(
            deployment, parameters={"task": task, "arguments": arguments}, flow_run_name=name, timeout=0
        )
    except ObjectNotFound:
        raise InputError(
            f"execution.dispatch: got {deployment.removeprefix(f'{FLOW}/')!r}, but there is no deployment "
            f"{deployment}; allowed: a name that `prefect deployment ls` shows"
        ) from None
    created: FlowRun = run
    return created


def _plain(value: Any) -> Any:
    """An argument as JSON; of the configuration of a study, the part that is a run's."""
    if isinstance(value, RunConfig):
        return computed_here(value).model_dump(mode="json", include=set(RunConfig.model_fields))
    return to_jsonable_python(value)


def computed_here(config: RunConfig) -> RunConfig:
    """The configuration for a process that computes every stage itself, not in a deployment."""
    return config.model_copy(update={"execution": config.execution.model_copy(update={"dispatch": None})})
