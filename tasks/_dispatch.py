"""Leaving a stage to a worker: its run is created, waited for, and cancelled together with the run that needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock
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
GATHER = 2.0  # seconds for which a stage waits for others to share its runs


class CrashedElsewhere(ConnectionError):
    """The worker or the process that ran a stage died; another worker may run it."""


class Cancelled(RuntimeError):
    """The flow was cancelled while one of its stages was under way."""


Stage = tuple[str, dict[str, Any]]  # the name of its task run, and the arguments of its task as JSON


@dataclass
class Gathered:
    """Stages that were ready at about the same time, and the runs that share them out."""

    stages: list[Stage]
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

    def gather(self, task: str, stage: Stage, share_out: Callable[[list[Stage]], Sequence[FlowRun]]) -> Gathered:
        """Share runs with all other stages of a task that become ready within a moment; the first one makes them."""
        with self._lock:
            if group := self._gathering.get(task):
                group.stages.append(stage)
                group.waiting += 1
                return group
            group = self._gathering[task] = Gathered([stage])
        self.stopped.wait(GATHER)
        with self._lock:
            del self._gathering[task]
        try:
            group.runs.set_result(share_out(group.stages))
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


def dispatch(config: RunConfig, is_built: Callable[[], bool], shared: bool) -> None:
    """Have a worker do what the current task is to do, and wait until it has.

    Args:
        config: the run's configuration.
        is_built: whether the artifact is there.
        shared: if more stages of the task are ready than the pool runs at once, share them out among as many runs as
            it does. Each of these finds or builds all of them, beginning with different ones, so that a worker that is
            late finds what others made. It saves starting a process for each stage.

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
    with get_client(sync_client=True) as client, runner.waiting():
        runner.check()
        stage = task.task_run.name, {key: _plain(value) for key, value in task.parameters.items()}

        def share_out(stages: list[Stage]) -> Sequence[FlowRun]:
            return _share_out(client, config, task.task.name, stages)

        try:
            group = runner.gather(task.task.name, stage, share_out) if shared else None
            runs = (group and group.runs.result()) or [_create(config, task.task.name, [stage])]
        except ObjectNotFound:
            raise InputError(
                f"execution.dispatch: got {config.execution.dispatch!r}, but there is no deployment "
                f"{_deployment(config)}; allowed: a name that `prefect deployment ls` shows"
            ) from None
        try:
            while not is_built() and not all(run.state and run.state.is_final() for run in runs):
                runner.pause(client, flow.flow_run.id)
                runs = [client.read_flow_run(run.id) for run in runs]
        except Cancelled:
            _cancel(client, runs, "The run that dispatched this stage has ended.")
            raise
        if not group or runner.leave(group):
            late = [run for run in runs if not run.start_time]
            _cancel(client, late, "Other runs have built all that this one was for.")
    lost = [run for run in runs if run.state and not run.state.is_completed()]
    if is_built() or not lost:
        return
    failed = next((run for run in lost if run.state and not run.state.is_crashed()), lost[0])  # rather than a crash
    assert failed.state
    message = f"{_deployment(config)}: flow run {failed.name} ended {failed.state.name}: {failed.state.message}"
    raise CrashedElsewhere(message) if failed.state.is_crashed() else RuntimeError(message)


def _cancel(client: SyncPrefectClient, runs: Iterable[FlowRun], message: str) -> None:
    for run in runs:
        if not (run.state and run.state.is_final()):
            client.set_flow_run_state(run.id, Cancelling(message=message))


def _deployment(config: RunConfig) -> str:
    return f"{FLOW}/{config.execution.dispatch}"


def _share_out(client: SyncPrefectClient, config: RunConfig, task: str, stages: list[Stage]) -> Sequence[FlowRun]:
    """As many runs as the pool has at once, each with all stages; none if it has as many as there are stages."""
    at_once = _at_once(client, config) if len(stages) > 1 else None
    if at_once is None or at_once >= len(stages):
        return []
    starts = [len(stages) * i // at_once for i in range(at_once)]
    return [_create(config, task, stages[start:] + stages[:start]) for start in starts]


def _create(config: RunConfig, task: str, stages: list[Stage]) -> FlowRun:
    more = f" and {len(stages) - 1} more" if len(stages) > 1 else ""
    run: Any = run_deployment(
        _deployment(config),
        parameters={"task": task, "arguments": [arguments for _, arguments in stages]},
        flow_run_name=f"{stages[0][0]}{more}, {config.model.short_name}",
        timeout=0,
    )
    created: FlowRun = run
    return created


def _at_once(client: SyncPrefectClient, config: RunConfig) -> int | None:
    """How many runs the deployment's pool has at once; None: any number."""
    pool = client.read_deployment_by_name(_deployment(config)).work_pool_name
    return client.read_work_pool(pool).concurrency_limit if pool else None


def _plain(value: Any) -> Any:
    """An argument as JSON; of the configuration of a study, the part that is a run's."""
    if isinstance(value, RunConfig):
        return computed_here(value).model_dump(mode="json", include=set(RunConfig.model_fields))
    return to_jsonable_python(value)


def computed_here(config: RunConfig) -> RunConfig:
    """The configuration for a process that computes every stage itself, not in a deployment."""
    return config.model_copy(update={"execution": config.execution.model_copy(update={"dispatch": None})})
