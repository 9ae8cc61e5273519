"""Executors: what makes the nodes of a stage graph, and what it does when one fails.

`StoreExecutor` works in this process on an artifact store, `FolderExecutor` on plain folders. Flows have one that makes
every node a Prefect task.
"""

import logging
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from itertools import chain, count
from pathlib import Path
from threading import RLock, Thread
from typing import Any

from tailored_llama.config import ExecutionConfig, StoreConfig, Work
from tailored_llama.console import progress_bar
from tailored_llama.errors import NothingToReport
from tailored_llama.pipeline.graph import Artifact, Facts, Graph, Node, nodes_in, run_stage
from tailored_llama.pipeline.workers import Slots, run_in, workers
from tailored_llama.processes import check_main, holding
from tailored_llama.progress import Progress
from tailored_llama.store import ArtifactRef, ArtifactStore, Manifest, place

log = logging.getLogger(__name__)

ALONE = RLock()  # one thing at a time: libraries are not made to be loaded by two threads, and time is measured


class Cancelled(RuntimeError):
    """The run was cancelled while one of its stages was under way."""


class IncompleteRun(RuntimeError):
    """Raised at the end of a run of which some nodes failed.

    `failed` are the failures, by the name of the node. `report` is of what there is.
    """

    def __init__(self, failed: Mapping[str, Exception], report: ArtifactRef | None = None) -> None:
        self.failed, self.report = failed, report
        super().__init__("; ".join(f"{name}: {error}" for name, error in failed.items()))


class Executor(ABC):
    """Makes nodes, and what they need.

    A node is begun once, however often it is asked for. When what it needs is made, it is made itself; if any of that
    fails, it is not. `result` and `open` wait for one node and raise its failure, `failures` waits for many and returns
    theirs. `ahead`: nodes are begun before one is waited for. Else each is made when it is asked for.
    """

    def __init__(self, ahead: bool = False) -> None:
        self.ahead = ahead
        self._begun: dict[str, tuple[Node, Any]] = {}  # each with its future
        self._failures: dict[str, dict[str, Exception]] = {}
        self._named: dict[str, str] = {}  # the ids of nodes by the names of their failures
        self._beginning = RLock()

    @abstractmethod
    def make(self, node: Node) -> Any:
        """Make a node whose inputs are made; returns its artifact."""

    @abstractmethod
    def folder(self, made: Any) -> Path:
        """The folder of an artifact, verified."""

    def begin(self, *values: Any) -> None:
        """Begin to make all nodes in some values, and what these need, if this executor works ahead."""
        for node in nodes_in(values) if self.ahead else ():
            self._begin(node)

    def open(self, artifact: Artifact) -> Path:
        """Make a node, and return the folder of its artifact; a failure is raised, also of what it needs."""
        if isinstance(artifact, Path):
            return artifact
        return self.folder(self.result(artifact))

    def result(self, node: Node) -> Any:
        """Make a node, and return its artifact; a failure is raised, also of what it needs."""
        for error in self.failures(node).values():
            raise error
        return self._begin(node).result()

    def failures(self, *values: Any) -> dict[str, Exception]:
        """Make all nodes in some values; returns which nodes failed of these and of what they need, by their names.

        Raises:
            Cancelled: the run was.
        """
        self.begin(*values)
        failed: dict[str, Exception] = {}
        for node in nodes_in(values):
            failed |= self._failed(node)
        return failed

    def begun(self) -> list[Node]:
        """All nodes that have been asked for so far."""
        return [node for node, _ in list(self._begun.values())]

    def foresee(self, *values: Any) -> None:  # noqa: B027, as most executors have nothing to do
        """Come before a composition asks for values, with nodes that it needs in any case; a dry run lists them."""

    def commit(self) -> None:  # noqa: B027, as most executors have nothing to do
        """Come before what cannot be taken back, such as the record of an opening; a dry run ends here."""

    def ready(self, node: Node) -> Node:
        """The same node with what its inputs have become."""
        return node.with_inputs(lambda leaf: self.result(leaf) if isinstance(leaf, Node) else leaf)

    def start(self, node: Node) -> Any:
        """Start to make a node, and return its future; what it needs has begun if this executor works ahead."""
        future: Future[Any] = Future()
        if self.ahead:  # a thread ends with this process
            Thread(target=self._settle, args=(node, future), name=node.name, daemon=True).start()
        else:
            self._settle(node, future)
        return future

    def _settle(self, node: Node, future: Future[Any]) -> None:
        try:
            if not self.lost(node):
                future.set_result(self.make(self.ready(node)))
        except BaseException as error:  # a library in Rust panics with one; nothing must wait forever
            future.set_exception(error)
            if not isinstance(error, Exception) and not self.ahead:
                raise

    def lost(self, node: Node) -> dict[str, Exception]:
        """The failures for which a node cannot be started, by name; waits for what it needs."""
        failed: dict[str, Exception] = {}
        for need in node.needs:
            failed |= self._failed(need)
            if failed and not self.ahead:
                break  # nothing else is made for it
        return failed

    def _begin(self, node: Node) -> Any:
        """The future of a node, which is begun if it was not yet."""
        if node.id not in self._begun:
            with self._beginning:
                if node.id not in self._begun:
                    for need in node.needs if self.ahead else ():
                        self._begin(need)
                    future: Future[Any] = Future()
                    if present := node.present(self.failures) if node.stage.tolerant else node:
                        future = self.start(present)
                    else:
                        future.set_exception(NothingToReport("report: there is nothing to report"))
                    self._begun[node.id] = node, future
        return self._begun[node.id][1]

    def _failed(self, node: Node) -> dict[str, Exception]:
        """The failures that leave a node without its artifact, by name; waits for it."""
        if node.id not in self._failures:
            failed = {} if node.stage.tolerant else self.lost(node)
            if not failed:
                try:
                    self._begin(node).result()
                except Cancelled:
                    raise
                except Exception as error:
                    failed = {self._name(node): error}
            self._failures[node.id] = failed
        return self._failures[node.id]

    def _name(self, node: Node) -> str:
        """The name of a node that no other one that failed has."""
        names = chain([node.name], (f"{node.name} ({number})" for number in count(2)))
        return next(name for name in names if self._named.setdefault(name, node.id) == node.id)


class StoreExecutor(Executor):
    """Makes every node in this process, one after another, or some side by side (`execution.processes`).

    What is in the store is not computed again.
    """

    def __init__(self, store: StoreConfig, execution: ExecutionConfig) -> None:
        super().__init__(ahead=execution.processes > 1)
        self.artifacts, self.downloads, self.execution = ArtifactStore(store.root), store.downloads, execution

    def make(self, node: Node) -> ArtifactRef:
        try:
            with progress_bar(node.name) as progress:
                ref, found = build(node, self.artifacts, self.downloads, self.execution, progress)
        except Exception as error:
            log.error("%s failed: %s", node.name, error)
            raise
        log.info("%s", describe(node, self.artifacts.manifest(ref), found))
        return ref

    def folder(self, made: Any) -> Path:
        return self.artifacts.open(made)


class FolderExecutor(Executor):
    """Makes every node at once, in a new folder below a scratch folder; nothing is kept, and nothing found again.

    A stage on the device waits for its turn there, as in every other run.
    """

    def __init__(self, scratch: Path, downloads: str, execution: ExecutionConfig) -> None:
        super().__init__()
        self.scratch, self.downloads, self.execution = scratch, downloads, execution
        self.facts: dict[Path, Facts] = {}

    def make(self, node: Node) -> Path:
        out = Path(tempfile.mkdtemp(prefix=f"{node.stage.name}-", dir=self.scratch))
        with progress_bar(node.name) as progress:
            work = Work(out, self.execution, self.downloads, progress)
            self.facts[out] = run_stage(node.stage, node.inputs, node.settings, work)
        return out

    def folder(self, made: Any) -> Path:
        return Path(made)

    def move(self, node: Artifact, out: Path) -> Mapping[str, Any]:
        """Move an artifact's files to an existing empty folder; returns what its stage measured."""
        folder = self.open(node)
        for file in folder.iterdir():
            shutil.move(file, out / file.name)
        return self.facts[folder] or {}


def execute(run: Executor, graph: Graph) -> ArtifactRef:
    """Make the nodes of a graph, and copy its exports to their folders; returns the reference of the report.

    Raises:
        Exception: what a check raised.
        IncompleteRun: nodes failed, or copies of exports; at the end.
    """
    run.begin(graph.checks)
    for check in graph.checks:
        run.result(check)
    lost, exports = run.failures(graph.report), list(graph.exports.values())
    run.begin(exports)  # last: a full disk must not cost the report
    needs = graph.report.needs if graph.report.stage.tolerant else []
    failed = {**graph.failed, **run.failures(needs)}
    failed |= {name: error for name, error in lost.items() if not (failed and isinstance(error, NothingToReport))}
    unplaced = dict(run.failures(exports))
    for folder, node in graph.exports.items():
        if not run.failures(node):
            try:
                place(run.open(node), folder, "store.export", "an exported model", [node.stage.name])
                log.info("finished model: %s", folder)
            except Exception as error:  # it must not cost the others, nor the report
                unplaced[node.name] = error
    failed |= unplaced
    if graph.publish and not lost and not unplaced:
        try:
            graph.publish()
        except Exception as error:
            failed["publish"] = error
    if failed:
        raise IncompleteRun(failed, None if lost else run.result(graph.report))
    reference: ArtifactRef = run.result(graph.report)
    return reference


def build(
    node: Node,
    artifacts: ArtifactStore,
    downloads: str,
    execution: ExecutionConfig,
    progress: Progress,
    check: Callable[[], None] = check_main,
) -> tuple[ArtifactRef, bool]:
    """Find or build the artifact of a node whose inputs are made; returns its reference, and whether it was there.

    A stage on the device waits for its turn there, and runs in a process of its own where some run side by side.

    Raises:
        Exception: what the stage raised, or `check`, which is called now and then: in this process, with the progress.
    """
    stage, fields, inputs, key = node.stage, node.fields, node.references, node.key

    def told(done: int, total: int) -> None:
        check()
        progress(done, total)

    def compute(slots: Slots, out: Path) -> Facts:
        check()  # whatever was waited for
        work = Work(out, execution, downloads, told, artifacts.resume_folder(key))
        opened = node.with_inputs(lambda leaf: artifacts.open(leaf) if isinstance(leaf, ArtifactRef) else leaf)
        if slots:
            return run_in(slots, opened, work, check)
        return run_stage(stage, opened.inputs, node.settings, work)

    with ExitStack() as held:  # outside of what the store measures: waiting is no work
        slots = Slots()
        if stage.on_device and execution.processes > 1 and not artifacts.find(stage.name, key):
            slots = held.enter_context(workers(execution.processes).held(stage.timed, check))
        if stage.timed or not stage.on_device:
            held.enter_context(holding(ALONE, check))
        return artifacts.build(stage.name, stage.version, fields, inputs, partial(compute, slots), check)


def describe(node: Node, manifest: Manifest, found: bool) -> str:
    """Say what became of a node, as one line of a log; `found`: its artifact was there."""
    line = f"{node.name}: {node.stage.name} {manifest.key[:12]}"
    if found:
        return f"{line}, found, nothing to do"
    facts = "".join(f", {name} {value}" for name, value in manifest.measured.items())
    return f"{line}, {manifest.seconds:.1f} s, peak memory {manifest.peak_memory_bytes / 1e9:.2f} GB{facts}"
