"""Leaving nodes to workers: their run is created, waited for, and cancelled together with the run that needs it."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
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
from prefect.states import Cancelling
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel, ConfigDict, TypeAdapter

from tailored_llama.config import ExecutionConfig, StoreConfig
from tailored_llama.errors import InputError
from tailored_llama.pipeline import STAGES, Cancelled, Node
from tailored_llama.store import ArtifactRef, ArtifactStore

FLOW = "stage"  # in flows/compositions.py
THREADS = 64  # nodes that one flow has under way at once, those that wait for others included
Result = Callable[[Node], ArtifactRef]
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


@dataclass(eq=False)
class Batch:
    """Nodes that one flow run makes one after another: a chain, or nodes that are ready at once.

    `run` is the last flow run, and `ordered` are the nodes that it was asked for. `tried` have waited for a flow run.
    """

    nodes: list[Node] = field(default_factory=list)
    run: FlowRun | None = None
    ordered: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    lock: Lock = field(default_factory=Lock)


class Batches:
    """The batch of each node that workers make.

    A node joins the batch of the node before it, if it needs nothing else that workers make. Of a stage that is shared,
    nodes that are ready at once share as many batches as the pool runs at once; None: any number.
    """

    def __init__(self, at_once: int | None = None) -> None:
        self.at_once = at_once
        self.behind: dict[str, frozenset[Batch]] = {}  # by node: the batches it waits for, or the one it is in
        self._siblings: dict[tuple[str, frozenset[Batch]], list[Batch]] = {}

    def add(self, node: Node) -> None:
        """Put a node, after those that it needs."""
        if node.id in self.behind:
            return
        behind = frozenset(batch for need in node.needs for batch in self.behind[need.id])
        if node.stage.on_device:
            batch = self._batch(node, behind)
            batch.nodes.append(node)
            behind = frozenset([batch])
        self.behind[node.id] = behind

    def _batch(self, node: Node, behind: frozenset[Batch]) -> Batch:
        needed = {need.id for need in node.needs}
        here = all(need.stage.on_device or not self.behind[need.id] for need in node.needs)
        for batch in behind:
            if len(behind) == 1 and here and batch.nodes[-1].id in needed:
                return batch
        if not node.stage.shared or self.at_once is None:
            return Batch()
        siblings = self._siblings.setdefault((node.stage.name, behind), [])
        if len(siblings) < self.at_once:
            siblings.append(Batch())
            return siblings[-1]
        return min(siblings, key=lambda batch: len(batch.nodes))


class Waiting(ThreadPoolTaskRunner[Any]):
    """Prefect's threads, which wait for dispatched nodes; all stop waiting when their flow ends or is cancelled."""

    def __init__(self, max_workers: int = THREADS) -> None:
        super().__init__(max_workers)
        self.stopped = Event()
        self._under_way = 0

    def wait(self, client: SyncPrefectClient, flow_run: UUID, run: FlowRun, is_built: Callable[[], bool]) -> State[Any]:
        """Wait until an artifact is there or a run has ended; returns the state of the run.

        The more nodes are under way, the longer are the pauses between two looks.

        Raises:
            Cancelled: the flow has been stopped, or someone asked for it. A worker stops the process of the flow, but
                not before seconds; and nobody stops one that was started from the command line.
        """
        both = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run, run.id]))
        states = {run.id: _state(run)}
        self._under_way += 1
        try:
            while not is_built() and not states[run.id].is_final():
                self.stopped.wait(EVERY * (1 + self._under_way // 10))
                states = {own.id: _state(own) for own in client.read_flow_runs(flow_run_filter=both)}
                if states[flow_run].is_cancelling() or states[flow_run].is_cancelled():
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


def dispatch(
    ready: Node, node: Node, batch: Batch, result: Result, store: StoreConfig, execution: ExecutionConfig
) -> bool:
    """Have a worker make a node of a batch, and wait until its artifact is there; `ready` has the inputs made.

    The run of its batch does so, if one is under way; else one begins with this node. `result` returns what another
    node has become. Returns whether a worker has made it for this flow.

    Raises:
        InputError: there is no such deployment, or it works with another store or another version of the code.
        ConnectionError: the worker died; another one may make the node.
        Cancelled: the flow was cancelled; so is the worker's run.
        RuntimeError: the worker's run failed.
    """
    flow = FlowRunContext.get()
    assert flow
    assert flow.flow_run
    assert flow.parameters
    runner, artifacts = flow.task_runner, open_store(store)
    assert isinstance(runner, Waiting)
    runner.check()

    def is_built() -> bool:
        return artifacts.find(ready.stage.name, ready.key) is not None

    if is_built():
        return node.id in batch.ordered
    deployment, model = f"{FLOW}/{execution.dispatch}", flow.parameters["config"].model.short_name
    with get_client(sync_client=True) as client:
        with batch.lock:
            if batch.run is None or node.id in batch.tried or node.id not in batch.ordered:
                order = _order(node, batch, result)
                runner.check()  # what it waited for may have been cancelled
                batch.ordered = set(order)
                batch.run = _create(deployment, list(order.values()), model, store, execution)
            batch.tried.add(node.id)
            run = batch.run
        state = runner.wait(client, flow.flow_run.id, run, is_built)
    if is_built():
        return True
    if state.is_completed():
        raise InputError(
            f"execution.dispatch: {execution.dispatch} completed, but store.root {store.root} has no "
            f"{ready.stage.name} {ready.key[:12]}; allowed: a deployment with the same store and the same version of "
            "the code"
        )
    message = f"{deployment}: flow run {run.name} ended {state.name}: {state.message}"
    raise ConnectionError(message) if state.is_crashed() else RuntimeError(message)


def pool_limit(deployment: str) -> int | None:
    """The number of runs that the deployment's pool has at once; None: any number, or there is no such deployment."""
    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        pool = client.read_deployment_by_name(f"{FLOW}/{deployment}").work_pool_name
        return client.read_work_pool(pool).concurrency_limit if pool else None
    return None


def _order(node: Node, batch: Batch, result: Result) -> dict[str, Ordered]:
    """The nodes of a batch that have not had their turn, by id; one that waits for what has failed is left out."""
    left = {own.id: own for own in batch.nodes if own is node or own.id not in batch.tried}
    order: dict[str, Ordered] = {}

    def made(leaf: Any) -> Any:
        if not isinstance(leaf, Node):
            return leaf
        return list(order).index(leaf.id) if leaf.id in left else result(leaf)

    for own in left.values():
        try:
            for check in own.checks:
                result(check)
            ready = own.with_inputs(made)
        except Exception as error:
            if own is node or isinstance(error, Cancelled):
                raise
            continue
        order[own.id] = Ordered.of(ready)
    return order


def _create(
    deployment: str, order: list[Ordered], model: str, store: StoreConfig, execution: ExecutionConfig
) -> FlowRun:
    here = execution.model_copy(update={"dispatch": None, "processes": 1})
    parameters = {
        "calls": [own.model_dump(mode="json") for own in order],
        "store": store.model_dump(mode="json"),
        "execution": here.model_dump(mode="json"),
    }
    more = f" and {len(order) - 1} more" if len(order) > 1 else ""
    name = f"{order[0].name}{more}, {model}"
    try:
        return cast(FlowRun, run_deployment(deployment, parameters=parameters, flow_run_name=name, timeout=0))
    except ObjectNotFound:
        raise InputError(
            f"execution.dispatch: got {execution.dispatch!r}, but there is no deployment {deployment}; "
            "allowed: a name that `prefect deployment ls` shows"
        ) from None


def _state(run: FlowRun) -> State[Any]:
    assert run.state
    return run.state
