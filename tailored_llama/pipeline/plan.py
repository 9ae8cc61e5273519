"""A dry run, as Make and Snakemake have it: which nodes are found, which are to be made, and how long that takes."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

from tailored_llama.config import RunConfig, StoreConfig
from tailored_llama.errors import InputError
from tailored_llama.pipeline.executor import Executor
from tailored_llama.pipeline.graph import Graph, Node, in_order, nodes_in
from tailored_llama.progress import duration
from tailored_llama.store import MANIFEST, ArtifactRef, ArtifactStore, read_manifest

RECENT = 20  # artifacts of a stage, whose times are looked at


class NotMade(BaseException):
    """Ends a composition that asks for a value which is not there; no error, so that nothing takes it for a failure."""


@dataclass(frozen=True)
class PlannedNode:
    """A node of a plan. `seconds` is what its stage took at the median of the last artifacts in the store."""

    name: str
    found: bool
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """The nodes of a run in their order. `open_after` names the node on whose value it depends what follows."""

    nodes: list[PlannedNode]
    open_after: str | None = None

    def lines(self) -> Iterator[str]:
        """The plan in lines, the last of which has the sums."""
        made = [node for node in self.nodes if not node.found]
        for node in self.nodes:
            time = "" if node.found or node.seconds is None else f"  about {duration(round(node.seconds))}"
            yield f"{'found' if node.found else 'to make':8} {node.name}{time}"
        known = [node.seconds for node in made if node.seconds is not None]
        told = f"{len(self.nodes)} nodes: {len(self.nodes) - len(made)} found, {len(made)} to make"
        if known:
            told += f", about {duration(round(sum(known)))} by earlier runs"
        if len(known) < len(made):
            told += f"; how long {len(made) - len(known)} take is not known yet"
        yield told
        if self.open_after:
            yield f"What follows, candidates and their scores among it, depends on the result of {self.open_after}."


class Planner(Executor):
    """Looks nodes up in a store, and makes none."""

    def __init__(self, store: StoreConfig) -> None:
        super().__init__()
        self.artifacts = ArtifactStore(store.root)

    def begin(self, *values: Any) -> None:
        for node in nodes_in(values):
            self._begin(node)

    def foresee(self, *values: Any) -> None:
        self.begin(*values)

    def make(self, node: Node) -> ArtifactRef:
        if (found := self.artifacts.look(node.stage.name, node.key)) is None:
            raise LookupError(node.name)
        return found

    def lost(self, node: Node) -> dict[str, Exception]:
        return self.failures(*nodes_in(node.inputs))  # checks change nothing of what is found

    def result(self, node: Node) -> Any:
        if self.failures(node):
            raise NotMade(node.name)
        return super().result(node)

    def commit(self) -> None:
        raise NotMade("the candidates' choice")  # before the proving rows are opened, or labels are asked for

    def folder(self, made: Any) -> Path:
        return self.artifacts.open(made)


def known_nodes(
    run: Planner, compose: Callable[[Executor, Any], Graph], config: RunConfig
) -> tuple[list[Node], str | None]:
    """The nodes of a composition, as far as the store has the values it asks for; and on what the others depend."""
    try:
        return compose(run, config).nodes(), None
    except NotMade as missing:
        return in_order(run.begun()), str(missing)


def plan_run(compose: Callable[[Executor, Any], Graph], config: RunConfig) -> Plan:
    """Plan the run of a composition."""
    run, planned = Planner(config.store), []
    seconds = cache(partial(_usual_seconds, run.artifacts))
    nodes, open_after = known_nodes(run, compose, config)
    for node in nodes:
        found = not run.failures(*in_order([node]) if node.stage.tolerant else [node])
        planned.append(PlannedNode(node.name, found, seconds(node.stage.name)))
    return Plan(planned, open_after)


def _usual_seconds(artifacts: ArtifactStore, stage: str) -> float | None:
    """The median of the seconds that the last artifacts of a stage took; None: there is none."""
    manifests = sorted(artifacts.local.glob(f"{stage}/*/{MANIFEST}"), key=lambda file: file.stat().st_mtime)
    seconds = []
    for file in manifests[-RECENT:]:
        with suppress(InputError, OSError):  # it is damaged, or was removed
            seconds.append(read_manifest(file.parent).seconds)
    return median(seconds) if seconds else None
