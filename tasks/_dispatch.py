"""Leaving nodes to workers: their run is created, waited for, and cancelled together with the run that needs it."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from threading import Event, Lock
from typing import Any, Self, cast
from uuid import UUID

from prefect import State, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelling
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel, ConfigDict, TypeAdapter

from tailored_llama.config import ExecutionConfig, StoreConfig
from tailored_llama.errors import InputError
from tailored_llama.pipeline import STAGES, Cancelled, Node, in_order
from tailored_llama.store import ArtifactRef, ArtifactStore

FLOW = "stage"  # in flows/compositions.py
THREADS = 64  # nodes that one flow has under way at once, those that wait for others included
EVERY = 1.0  # seconds between two looks at a dispatched run, and as many more for each ten nodes under way


class Ordered(BaseModel):
    """A node as JSON, for a worker. An input is made already, or is the position of an earlier node of the order."""

    model_config = ConfigDict(frozen=True)

    name: str
    stage: str
    settings: dict[str, Any] | None
    inputs: dict[str, ArtifactRef | int | dict[str, ArtifactRef | int] | None]

    @classmethod
    def of(cls, node: Node) -> Self:
        settings = TypeAdapter(node.stage.settings).dump_python(node.settings, mode="json")
        return cls(name=node.name, stage=node.stage.name, settings=settings, inputs=dict(node.inputs))


def nodes_of(order: Iterable[Ordered]) -> list[Node]:
    """The nodes of an order."""
    nodes: list[Node] = []
    for own in order:
        stage = STAGES[own.stage]
        node = Node(stage, TypeAdapter(stage.settings).validate_python(own.settings), own.inputs, own.name)
        nodes.append(node.with_inputs(lambda leaf: nodes[leaf] if isinstance(leaf, int) else leaf))
    return nodes


@cache
def open_store(store: StoreConfig) -> ArtifactStore:
    """The store of a run; one object per process, so that each file is hashed once."""
    return ArtifactStore(store.root)


class Waiting(ThreadPoolTaskRunner[Any]):
    """Prefect's threads, which wait for dispatched nodes; all stop waiting when their flow ends or is cancelled."""

    def __init__(self, max_workers: int = THREADS) -> None:
        super().__init__(max_workers)
        self.stopped = Event()
        self._under_way = 0

    def wait(self, client: SyncPrefectClient, flow: UUID, run: FlowRun, is_built: Callable[[], bool]) -> State[Any]:
        """Wait until an artifact is there or a run has ended; returns the state of the run.

        The more nodes are under way, the longer are the pauses between two looks.

        Raises:
            Cancelled: the flow has been stopped, or someone asked for it. A worker stops the process of the flow, but
                not before seconds; and nobody stops one that was started from the command line.
        """
        both = FlowRunFilter(id=FlowRunFilterId(any_=[flow, run.id]))
        states = {run.id: _state(run)}
        self._under_way += 1
        try:
            while not is_built() and not states[run.id].is_final():
                self.stopped.wait(EVERY * (1 + self._under_way // 10))
                states = {own.id: _state(own) for own in client.read_flow_runs(flow_run_filter=both)}
                if states[flow].is_cancelling() or states[flow].is_cancelled():
                    self.stopped.set()
                self.check()
        except Cancelled:
            if not states[run.id].is_final():
                client.set_flow_run_state(run.id, Cancelling(message="The run that needs this node has ended."))
            raise
        finally:
            self._under_way -= 1
        return states[run.id]

    def cancel_all(self) -> None:
        self.stopped.set()
        super().cancel_all()

    def check(self) -> None:
        if self.stopped.is_set():
            raise Cancelled("the run was cancelled")


THREADED: Any = Waiting()  # the runner of flows that dispatch; each run has a copy


class Dispatcher:
    """Has workers make the nodes of a flow that are to be computed on the device.

    One flow run makes several nodes one after another: a chain, each of which needs the one before it; or, of a stage
    that is shared, those that are ready at once, in as many runs as the pool has at once. A node joins only if all that
    it needs is made before the run begins, or by it. `result` returns what a node has become.
    """

    def __init__(self, store: StoreConfig, execution: ExecutionConfig, result: Callable[[Node], ArtifactRef]) -> None:
        self.store, self.execution, self.result = store, execution, result
        self.deployment = f"{FLOW}/{execution.dispatch}"
        self.local = set[str]()  # nodes that wait for no worker
        self._at_once = pool_limit(self.deployment)
        self._nodes = dict[str, Node]()
        self._runs = dict[str, Future[FlowRun]]()  # the run that makes a node, as soon as it is decided
        self._lock = Lock()

    def add(self, nodes: Iterable[Node]) -> None:
        """Make nodes known, each after those that it needs."""
        with self._lock:
            for node in nodes:
                self._nodes.setdefault(node.id, node)
                if not node.stage.on_device and all(need.id in self.local for need in node.needs):
                    self.local.add(node.id)

    def dispatch(self, node: Node, ready: Node) -> bool:
        """Have a worker make a node, and wait until its artifact is there; `ready` has the inputs made.

        Returns whether a worker has made it for this flow.

        Raises:
            InputError: there is no such deployment, or it works with another store or another version of the code.
            ConnectionError: the worker died; another one may make the node.
            Cancelled: the flow was cancelled; so is the worker's run.
            RuntimeError: the worker's run failed.
        """
        flow = FlowRunContext.get()
        assert flow
        assert flow.flow_run
        runner, artifacts = flow.task_runner, open_store(self.store)
        assert isinstance(runner, Waiting)
        runner.check()

        def is_built() -> bool:
            return artifacts.find(ready.stage.name, ready.key) is not None

        if is_built():
            return node.id in self._runs
        asked = self._ask(node)
        run = asked.result()
        with get_client(sync_client=True) as client:
            state = runner.wait(client, flow.flow_run.id, run, is_built)
        if is_built():
            return True
        if state.is_completed():
            raise InputError(
                f"execution.dispatch: {self.execution.dispatch} completed, but store.root {self.store.root} has no "
                f"{ready.stage.name} {ready.key[:12]}; allowed: a deployment with the same store and the same version "
                "of the code"
            )
        message = f"{self.deployment}: flow run {run.name} ended {state.name}: {state.message}"
        if not state.is_crashed():
            raise RuntimeError(message)
        self._forget(asked)
        raise ConnectionError(message)

    def _ask(self, node: Node) -> Future[FlowRun]:
        """The run that makes a node; if it is in none yet, one is created, for others, too."""
        with self._lock:
            orders = [] if node.id in self._runs else [(Future[FlowRun](), order) for order in self._orders(node)]
            for asked, order in orders:
                self._runs |= dict.fromkeys((own.id for own in order), asked)
            own_run = self._runs[node.id]
        for asked, order in orders:
            try:
                asked.set_result(self._create(order))
            except Exception as error:
                self._forget(asked)  # another try asks anew
                asked.set_exception(error)
        return own_run

    def _forget(self, asked: Future[FlowRun]) -> None:
        with self._lock:
            self._runs = {name: run for name, run in self._runs.items() if run is not asked}

    def _orders(self, node: Node) -> list[list[Node]]:
        """The nodes that runs are to make, with a node whose inputs are made; nodes that are in a run are left out."""
        made = self.local | {own.id for own in in_order([node])}
        left = [own for own in self._nodes.values() if own.stage.on_device and own.id not in self._runs]

        def is_ready(own: Node) -> bool:
            return all(need.id in made for need in own.needs)

        if node.stage.shared:
            alike = [own for own in left if own.stage is node.stage and is_ready(own)]
            count = min(len(alike), self._at_once or len(alike))
            return [alike[first::count] for first in range(count)]
        chain = [node]
        for own in left:
            if chain[-1].id in {need.id for need in own.needs} and is_ready(own):
                chain.append(own)
                made.add(own.id)
        return [chain]

    def _create(self, order: Iterable[Node]) -> FlowRun:
        """Create a run that makes nodes, without those that wait for what has failed."""
        calls = dict[str, Ordered]()

        def made(leaf: Any) -> Any:
            if not isinstance(leaf, Node):
                return leaf
            return list(calls).index(leaf.id) if leaf.id in calls else self.result(leaf)

        for node in order:
            try:
                for check in node.checks:
                    self.result(check)
                calls[node.id] = Ordered.of(node.with_inputs(made))
            except Cancelled:
                raise
            except Exception:
                continue
        first, *more = [own.name for own in calls.values()]
        model = flow_run.parameters["config"].model.short_name
        here = self.execution.model_copy(update={"dispatch": None, "processes": 1})
        parameters = {
            "calls": [own.model_dump(mode="json") for own in calls.values()],
            "store": self.store.model_dump(mode="json"),
            "execution": here.model_dump(mode="json"),
        }
        name = f"{first}{f' and {len(more)} more' if more else ''}, {model}"
        try:
            return cast(FlowRun, run_deployment(self.deployment, parameters=parameters, flow_run_name=name, timeout=0))
        except ObjectNotFound:
            raise InputError(
                f"execution.dispatch: got {self.execution.dispatch!r}, but there is no deployment {self.deployment}; "
                "allowed: a name that `prefect deployment ls` shows"
            ) from None


def pool_limit(deployment: str) -> int | None:
    """The number of runs that the deployment's pool has at once; None: any number, or there is no such deployment."""
    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        pool = client.read_deployment_by_name(deployment).work_pool_name
        return client.read_work_pool(pool).concurrency_limit if pool else None
    return None


def _state(run: FlowRun) -> State[Any]:
    assert run.state
    return run.state
