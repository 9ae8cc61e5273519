"""Leaving a stage to a worker: its run is created, waited for, and cancelled together with the run that needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Lock
from typing import Any, cast
from uuid import UUID

from prefect import State, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, Completed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel, ConfigDict, TypeAdapter

from tailored_llama.config import ExecutionConfig, StoreConfig
from tailored_llama.errors import InputError
from tailored_llama.pipeline import STAGES, Call, Cancelled
from tailored_llama.store import ArtifactRef

FLOW = "stage"  # in flows/compositions.py
THREADS = 64  # stages that one flow has under way at once
EVERY = 1.0  # seconds between two looks at a dispatched run, and one more for each ten stages under way
GATHER = 2.0  # seconds for which a stage waits for others to share its runs
NOT_NEEDED: State[Any] = Completed(name="NotNeeded", message="Other runs have made all that this one was for.")


class CrashedElsewhere(ConnectionError):
    """The worker or the process that ran a stage died; another worker may run it."""


class Ordered(BaseModel):
    """A call of a stage as JSON, for a worker."""

    model_config = ConfigDict(frozen=True)

    name: str
    stage: str
    settings: dict[str, Any]
    inputs: dict[str, ArtifactRef | dict[str, ArtifactRef] | None]

    @classmethod
    def of(cls, call: Call[Any]) -> Ordered:
        settings = TypeAdapter(call.stage.settings).dump_python(call.settings, mode="json")
        return cls(name=call.name, stage=call.stage.name, settings=settings, inputs=dict(call.inputs))

    def call(self) -> Call[Any]:
        stage = STAGES[self.stage]
        return Call(stage, TypeAdapter(stage.settings).validate_python(self.settings), self.inputs, self.name)


@dataclass(frozen=True)
class Order:
    """Where a worker finds the inputs of a stage and how it works; `model` is what its run is named after."""

    deployment: str
    store: StoreConfig
    execution: ExecutionConfig
    model: str


@dataclass
class Gathered:
    """Calls that were ready at about the same time, and the runs that share them out."""

    calls: list[Ordered]
    waiting: int = 1  # stages that wait for the runs
    runs: Future[Sequence[FlowRun]] = field(default_factory=Future)  # none if there is a worker for each stage


class Waiting(ThreadPoolTaskRunner[Any]):
    """Prefect's threads, which wait for dispatched stages; all stop waiting when their flow ends or is cancelled."""

    def __init__(self, max_workers: int = THREADS) -> None:
        super().__init__(max_workers)
        self.stopped = Event()
        self.under_way = 0
        self._looked = 0.0
        self._gathering: dict[str, Gathered] = {}
        self._lock = Lock()

    def gather(self, call: Ordered, share_out: Callable[[list[Ordered]], Sequence[FlowRun]]) -> Gathered:
        """Share runs with all other calls of a stage that become ready within a moment; the first one makes them."""
        with self._lock:
            if group := self._gathering.get(call.stage):
                group.calls.append(call)
                group.waiting += 1
                return group
            group = self._gathering[call.stage] = Gathered([call])
        self.stopped.wait(GATHER)
        with self._lock:
            del self._gathering[call.stage]
        try:
            group.runs.set_result(share_out(group.calls))
        except Exception as error:
            group.runs.set_exception(error)
        return group

    def leave(self, group: Gathered) -> bool:
        """Stop waiting for the runs of a group; returns whether nobody waits any more."""
        with self._lock:
            group.waiting -= 1
            return not group.waiting

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


def dispatch(order: Order, call: Call[Any], is_built: Callable[[], bool]) -> None:
    """Have a worker run a call, and wait until it has.

    If more calls of a shared stage are ready than the pool runs at once, they are shared out among as many runs as it
    does. Each of these finds or builds all of them, beginning with different ones, so that a worker that is late finds
    what others made. It saves starting a process for each call.

    Args:
        order: the deployment, and what its run has in common with this one.
        call: the stage with its settings and inputs.
        is_built: whether the artifact is there.

    Raises:
        InputError: there is no such deployment.
        CrashedElsewhere: the worker died.
        Cancelled: the flow was cancelled; so is the worker's run.
        RuntimeError: the worker's run failed.
    """
    flow = FlowRunContext.get()
    assert flow
    assert flow.flow_run
    runner = flow.task_runner
    assert isinstance(runner, Waiting)
    with get_client(sync_client=True) as client, runner.waiting():
        runner.check()
        ordered = Ordered.of(call)
        try:
            group = runner.gather(ordered, partial(_share_out, client, order)) if call.stage.shared else None
            runs = (group and group.runs.result()) or [_create(order, [ordered])]
        except ObjectNotFound:
            raise InputError(
                f"execution.dispatch: got {order.deployment!r}, but there is no deployment {FLOW}/{order.deployment}; "
                "allowed: a name that `prefect deployment ls` shows"
            ) from None
        try:
            while not is_built() and not all(run.state and run.state.is_final() for run in runs):
                runner.pause(client, flow.flow_run.id)
                runs = [client.read_flow_run(run.id) for run in runs]
        except Cancelled:
            for run in _unfinished(runs):
                client.set_flow_run_state(run.id, Cancelling(message="The run that dispatched this stage has ended."))
            raise
        if not group or runner.leave(group):
            for run in _unfinished(runs):
                if not run.start_time:
                    client.set_flow_run_state(run.id, NOT_NEEDED)
    lost = [run for run in runs if run.state and not run.state.is_completed()]
    if is_built() or not lost:
        return
    failed = next((run for run in lost if run.state and not run.state.is_crashed()), lost[0])  # rather than a crash
    assert failed.state
    message = f"{FLOW}/{order.deployment}: flow run {failed.name} ended {failed.state.name}: {failed.state.message}"
    raise CrashedElsewhere(message) if failed.state.is_crashed() else RuntimeError(message)


def _unfinished(runs: Iterable[FlowRun]) -> list[FlowRun]:
    return [run for run in runs if not (run.state and run.state.is_final())]


def _share_out(client: SyncPrefectClient, order: Order, calls: list[Ordered]) -> Sequence[FlowRun]:
    """As many runs as the pool has at once, each with all calls; none if it has as many as there are calls."""
    at_once = _at_once(client, order.deployment) if len(calls) > 1 else None
    if at_once is None or at_once >= len(calls):
        return []
    starts = [len(calls) * i // at_once for i in range(at_once)]
    return [_create(order, calls[start:] + calls[:start]) for start in starts]


def _create(order: Order, calls: list[Ordered]) -> FlowRun:
    more = f" and {len(calls) - 1} more" if len(calls) > 1 else ""
    run = run_deployment(
        f"{FLOW}/{order.deployment}",
        parameters={
            "calls": [call.model_dump(mode="json") for call in calls],
            "store": order.store.model_dump(mode="json"),
            "execution": order.execution.model_dump(mode="json"),
        },
        flow_run_name=f"{calls[0].name}{more}, {order.model}",
        timeout=0,
    )
    return cast(FlowRun, run)


def _at_once(client: SyncPrefectClient, deployment: str) -> int | None:
    """How many runs the deployment's pool has at once; None: any number."""
    pool = client.read_deployment_by_name(f"{FLOW}/{deployment}").work_pool_name
    return client.read_work_pool(pool).concurrency_limit if pool else None
