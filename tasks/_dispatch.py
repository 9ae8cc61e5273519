"""Leaving a stage to a worker: its run is created, waited for, and cancelled together with the run that needs it."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Event, Lock
from typing import Any, Self, cast
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
from tailored_llama.pipeline import STAGES, Cancelled, Node
from tailored_llama.store import ArtifactRef

FLOW = "stage"  # in flows/compositions.py
THREADS = 64  # stages that one flow has under way at once
EVERY = 1.0  # seconds between two looks at a dispatched run, and as many more for each ten stages under way
GATHER = 2.0  # seconds for which a stage waits for others to share its runs
NOT_NEEDED: State[Any] = Completed(name="NotNeeded", message="Other runs have made all artifacts of this one.")


class CrashedElsewhere(ConnectionError):
    """The worker or the process that ran a stage died; another worker may run it."""


class Ordered(BaseModel):
    """A node whose inputs are made as JSON, for a worker."""

    model_config = ConfigDict(frozen=True)

    name: str
    stage: str
    settings: dict[str, Any]
    inputs: dict[str, ArtifactRef | dict[str, ArtifactRef] | None]

    @classmethod
    def of(cls, node: Node) -> Self:
        settings = TypeAdapter(node.stage.settings).dump_python(node.settings, mode="json")
        return cls(name=node.name, stage=node.stage.name, settings=settings, inputs=dict(node.inputs))

    def node(self) -> Node:
        stage = STAGES[self.stage]
        return Node(stage, TypeAdapter(stage.settings).validate_python(self.settings), self.inputs, self.name)


class Waiting(ThreadPoolTaskRunner[Any]):
    """Prefect's threads, which wait for dispatched stages; all stop waiting when their flow ends or is cancelled."""

    def __init__(self, max_workers: int = THREADS) -> None:
        super().__init__(max_workers)
        self.stopped = Event()
        self._under_way, self._looked = 0, 0.0
        self._gathering: dict[str, tuple[list[Ordered], Future[Sequence[FlowRun]]]] = {}
        self._lock = Lock()

    def gather(
        self, call: Ordered, share_out: Callable[[list[Ordered]], Sequence[FlowRun]]
    ) -> tuple[list[Ordered], Sequence[FlowRun]]:
        """All calls of a stage that become ready within a moment, and their runs, which the first of them makes."""
        with self._lock:
            is_first = call.stage not in self._gathering
            calls, runs = self._gathering.setdefault(call.stage, ([], Future()))
            calls.append(call)
        if is_first:
            try:
                try:
                    self.stopped.wait(GATHER)
                finally:
                    with self._lock:
                        del self._gathering[call.stage]
                runs.set_result(share_out(calls))
            except BaseException as error:  # an interrupt, too: the others wait for it
                runs.set_exception(error)
        return calls, runs.result()

    def leave(self, call: Ordered, calls: list[Ordered]) -> bool:
        """Stop waiting for the runs of some calls; returns whether nobody waits any more."""
        with self._lock:
            calls.remove(call)
            return not calls

    def wait(
        self, client: SyncPrefectClient, flow_run: UUID, runs: Sequence[FlowRun], is_built: Callable[[], bool]
    ) -> Sequence[FlowRun]:
        """Wait until an artifact is there or all runs have ended; returns the runs as they then are.

        The more stages are under way, the longer are the pauses between two looks.

        Raises:
            Cancelled: the flow has been stopped, or someone asked for it. A worker stops the process of the flow, but
                not before seconds; and nobody stops one that was started from the command line.
        """
        self._under_way += 1
        try:
            while not is_built() and not all(_state(run).is_final() for run in runs):
                self.stopped.wait(EVERY * (1 + self._under_way // 10))
                if time.monotonic() - self._looked > EVERY:  # one thread asks for all
                    self._looked = time.monotonic()
                    state = _state(client.read_flow_run(flow_run))
                    if state.is_cancelling() or state.is_cancelled():
                        self.stopped.set()
                self.check()
                runs = [client.read_flow_run(run.id) for run in runs]
        except Cancelled:
            for run in runs:
                if not _state(run).is_final():
                    client.set_flow_run_state(run.id, Cancelling(message="The run that needs this stage has ended."))
            raise
        finally:
            self._under_way -= 1
        return runs

    def cancel_all(self) -> None:
        self.stopped.set()
        super().cancel_all()

    def check(self) -> None:
        if self.stopped.is_set():
            raise Cancelled("the run was cancelled")


THREADED: Any = Waiting()  # the runner of flows that dispatch; each run has a copy


def dispatch(node: Node, store: StoreConfig, execution: ExecutionConfig, is_built: Callable[[], bool]) -> None:
    """Have a worker make a node, and wait until the artifact is there.

    If more calls of a shared stage are ready than the pool runs at once, they are shared out among as many runs as it
    does. Each of these finds or builds all of them, beginning with different ones, so that a worker that is late finds
    what others made. It saves starting a process for each call.

    Raises:
        InputError: there is no such deployment, or it works with another store or another version of the code.
        CrashedElsewhere: the worker died.
        Cancelled: the flow was cancelled; so is the worker's run.
        RuntimeError: the worker's run failed.
    """
    flow = FlowRunContext.get()
    assert flow
    assert flow.flow_run
    assert flow.parameters
    runner = flow.task_runner
    assert isinstance(runner, Waiting)
    runner.check()
    here = execution.model_copy(update={"dispatch": None, "processes": 1})
    common = {"store": store.model_dump(mode="json"), "execution": here.model_dump(mode="json")}
    deployment = f"{FLOW}/{execution.dispatch}"
    create = partial(_create, deployment, common, flow.parameters["config"].model.short_name)
    ordered = Ordered.of(node)
    with get_client(sync_client=True) as client:
        try:
            share_out = partial(_share_out, client, deployment, create)
            calls, runs = runner.gather(ordered, share_out) if node.stage.shared else ([ordered], ())
            if not runs:
                calls, runs = [ordered], [create([ordered])]
        except ObjectNotFound:
            raise InputError(
                f"execution.dispatch: got {execution.dispatch!r}, but there is no deployment {deployment}; "
                "allowed: a name that `prefect deployment ls` shows"
            ) from None
        runs = runner.wait(client, flow.flow_run.id, runs, is_built)
        if runner.leave(ordered, calls):
            for run in runs:
                if not run.start_time and not _state(run).is_final():
                    client.set_flow_run_state(run.id, NOT_NEEDED)
    if is_built():
        return
    run = min(runs, key=lambda run: (_state(run).is_completed(), _state(run).is_crashed()))  # a failure says most
    state = _state(run)
    if state.is_completed():
        raise InputError(
            f"execution.dispatch: {execution.dispatch} completed, but store.root {store.root} has no {node.stage.name} "
            f"{node.key[:12]}; allowed: a deployment with the same store and the same version of the code"
        )
    message = f"{deployment}: flow run {run.name} ended {state.name}: {state.message}"
    raise CrashedElsewhere(message) if state.is_crashed() else RuntimeError(message)


def _state(run: FlowRun) -> State[Any]:
    assert run.state
    return run.state


def _share_out(
    client: SyncPrefectClient, deployment: str, create: Callable[[list[Ordered]], FlowRun], calls: list[Ordered]
) -> Sequence[FlowRun]:
    """As many runs as the pool has at once, each with all calls; none if it has as many as there are calls."""
    at_once = _at_once(client, deployment) if len(calls) > 1 else None
    if at_once is None or at_once >= len(calls):
        return ()
    starts = [len(calls) * i // at_once for i in range(at_once)]
    return [create(calls[start:] + calls[:start]) for start in starts]


def _create(deployment: str, common: dict[str, Any], model: str, calls: list[Ordered]) -> FlowRun:
    more = f" and {len(calls) - 1} more" if len(calls) > 1 else ""
    parameters = {"calls": [call.model_dump(mode="json") for call in calls], **common}
    name = f"{calls[0].name}{more}, {model}"
    return cast(FlowRun, run_deployment(deployment, parameters=parameters, flow_run_name=name, timeout=0))


def _at_once(client: SyncPrefectClient, deployment: str) -> int | None:
    """Return how many runs the deployment's pool has at once; None: any number."""
    pool = client.read_deployment_by_name(deployment).work_pool_name
    return client.read_work_pool(pool).concurrency_limit if pool else None
