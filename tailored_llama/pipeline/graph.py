"""The stage graph: what a composition returns, before anything of it is computed.

A stage is declared as a function of settings and artifacts (`stages.py`). A call of it gives a node: the stage, its
settings, its inputs, and a name for people. Executors make nodes (`executor.py`).
"""

import gc
import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Generic, ParamSpec, Union, get_args

from pydantic import BaseModel

from tailored_llama import models
from tailored_llama.config import Work
from tailored_llama.errors import one_line
from tailored_llama.memory import without_gc
from tailored_llama.store import ArtifactRef, artifact_key

P = ParamSpec("P")
Facts = Mapping[str, Any] | None  # what a stage measured; it goes into the manifest and into no file
Artifact = Union["Node", Path]  # what a stage reads: a node, or a folder that somebody else made
Artifacts = Mapping[str, Artifact]


@dataclass(frozen=True)
class Stage(Generic[P]):
    """A step of the path of the data: its name, its version, and the function that makes its artifact.

    `load` returns the function, so that a stage whose artifact is found loads no library. The function is called with
    the folders of its inputs, `settings` and `work`. All but `work` enter the key.
    """

    name: str  # also of its artifacts' folder in the store
    version: int  # raised when the output changes
    load: Callable[[], Callable[..., Facts]]
    parameters: Mapping[str, inspect.Parameter]  # of the declaration
    on_device: bool = False  # it computes on the run's device, and waits for its turn there
    timed: bool = False  # it measures time, alone; any other takes less memory when it is tried again
    shared: bool = False  # workers share out the nodes that are ready at once, instead of starting a process for each
    tolerant: bool = False  # inputs that failed are left out, and it is made of the others

    def __call__(self, title: str, /, *args: P.args, **kwargs: P.kwargs) -> "Node":
        """A node of this stage; `title` is its name for people, such as `tune arc_easy @ 0.20`."""
        inputs = dict(kwargs)
        return Node(self, inputs.pop("settings", None), inputs, title)

    @property
    def settings(self) -> type[Any]:
        """The class of its settings; NoneType: it depends on its inputs alone."""
        return self.parameters["settings"].annotation or NoneType

    def function(self) -> Callable[..., Facts]:
        """The function, with the libraries that it needs; what these consist of is never searched for garbage."""
        is_first = "transformers" not in sys.modules
        with without_gc():
            function = self.load()
        if is_first:
            gc.freeze()
        return function


def stage(
    name: str, version: int, load: Callable[[], Callable[..., Facts]], **how: bool
) -> Callable[[Callable[P, None]], Stage[P]]:
    """Declare a stage by the signature of a function, whose body is never run; `how` are the flags of `Stage`."""
    return lambda function: Stage(name, version, load, inspect.signature(function).parameters, **how)


@dataclass(frozen=True, eq=False)
class Node:
    """An artifact that can be made: a stage with its settings and inputs, and its name for people.

    An input is a node, a folder, or a mapping, sequence or dataclass of them. Once made, it is an `ArtifactRef`.
    """

    stage: Stage[Any]
    settings: Any
    inputs: Mapping[str, Any]
    name: str
    checks: tuple["Node", ...] = ()  # made before it, though it reads nothing of them

    @cached_property
    def id(self) -> str:
        """A hash of all that the node is made of; equal nodes are made once."""
        leaves = [(label, leaf.id if isinstance(leaf, Node) else repr(leaf)) for label, leaf in flatten(self.inputs)]
        return hashlib.sha256(repr((self.stage.name, self.settings, leaves)).encode()).hexdigest()

    @property
    def needs(self) -> list["Node"]:
        """The nodes that must be made before it."""
        return [*self.checks, *nodes_in(self.inputs)]

    def after(self, *checks: "Node") -> "Node":
        """The same node, made only once some checks have succeeded."""
        return replace(self, checks=checks)

    @property
    def references(self) -> dict[str, ArtifactRef]:
        """Every input that is made, by its label, such as `prompts arc_easy`."""
        return {label: leaf for label, leaf in flatten(self.inputs) if isinstance(leaf, ArtifactRef)}

    @property
    def fields(self) -> dict[str, Any]:
        """The settings, and whatever values stand among the inputs, as JSON."""
        values = {label: as_json(leaf) for label, leaf in flatten(self.inputs) if not isinstance(leaf, ArtifactRef)}
        return (as_json(self.settings) or {}) | ({"inputs": values} if values else {})

    @property
    def key(self) -> str:
        """The key of the artifact, once its inputs are made."""
        return artifact_key(self.stage.name, self.stage.version, self.fields, self.references)

    def with_inputs(self, change: Callable[[Any], Any]) -> "Node":
        """The same node with a function's value in place of every leaf of its inputs."""
        return replace(self, inputs=map_leaves(change, self.inputs))

    def present(self, failures: Callable[[Any], Mapping[str, Exception]]) -> "Node | None":
        """The same node without the inputs that failed; None if one that it cannot do without has.

        A parameter `failed` of its stage gets the errors, by the names of the nodes that failed.
        """
        inputs, declared = dict[str, Any](), self.stage.parameters
        for name, value in self.inputs.items():
            inputs[name] = _present(value, failures)
            if inputs[name] is None and value is not None and NoneType not in get_args(declared[name].annotation):
                return None
        if "failed" in declared:
            inputs["failed"] = {name: one_line(error) for name, error in failures(self.needs).items()}
        return replace(self, inputs=inputs)


@dataclass(frozen=True)
class Graph:
    """What a composition returns: the node of its report, and what else becomes of the nodes.

    `checks` are made first; the first that fails ends the run. `exports` are nodes by the folder that gets a copy of
    their artifact. `publish` is done with these copies at the end. `failed` are failures on the way to the graph.
    """

    report: Node
    checks: Sequence[Node] = ()
    exports: Mapping[Path, Node] = field(default_factory=dict)
    failed: Mapping[str, Exception] = field(default_factory=dict)
    publish: Callable[[], None] | None = None

    def nodes(self) -> list[Node]:
        """All nodes, each after those that it reads."""
        return in_order([*self.checks, self.report, *self.exports.values()])


def in_order(nodes: Iterable[Node]) -> list[Node]:
    """Nodes and all that they need, each once, and after those that it reads."""
    found: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.id not in found:
            for need in node.needs:
                visit(need)
            found[node.id] = node

    for node in nodes:
        visit(node)
    return list(found.values())


def run_stage(stage: Stage[Any], inputs: Mapping[str, Any], settings: Any, work: Work) -> Facts:
    """Run a stage's function on the folders of its inputs; on the device it waits for its turn.

    An error is raised without the variables on its way: executors keep it, and these may be whole models.
    """
    function = stage.function()
    try:
        with models.device_slot(work.execution, work.downloads) if stage.on_device else nullcontext():
            return function(**inputs, settings=settings, work=work)
    except Exception as error:
        for part in filter(None, (error, error.__cause__, error.__context__)):
            traceback.clear_frames(part.__traceback__)
        raise


def as_json(value: Any) -> Any:
    """A value as JSON for a key. What has an `identity`, such as a file, counts by it, and not by its place."""
    if hasattr(value, "identity"):
        return as_json(value.identity())
    if isinstance(value, BaseModel):
        return {name: as_json(getattr(value, name)) for name in type(value).model_fields}
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_json(part) for part in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"settings: got {value!r}; allowed: plain values, sections, dataclasses, and what has an identity")


def _parts(value: Any) -> dict[str, Any] | None:
    """The parts of a mapping, dataclass or sequence by label; None: it is a leaf.

    A part of a sequence is known by its attribute `label`, or else by its position.
    """
    if isinstance(value, Mapping):
        return {str(name): part for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, Node | ArtifactRef | type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {str(getattr(part, "label", i)): part for i, part in enumerate(value)}
    return None


def flatten(value: Any, label: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, sequences and dataclasses, each with the path to it as label; None is left out."""
    if (parts := _parts(value)) is not None:
        for name, part in parts.items():
            yield from flatten(part, f"{label} {name}".strip())
    elif value is not None:
        yield label, value


def nodes_in(value: Any) -> list[Node]:
    """The nodes in a nested value."""
    return [leaf for _, leaf in flatten(value) if isinstance(leaf, Node)]


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """The same nested value with a function's value in place of every leaf; None stays."""
    if value is None:
        return None
    if _parts(value) is None:
        return change(value)
    return _rebuilt(value, lambda part: map_leaves(change, part))


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A mapping, sequence or dataclass with a function's value in place of every part."""
    if isinstance(value, Mapping):
        return {name: change(part) for name, part in value.items()}
    if isinstance(value, Sequence):
        return tuple(change(part) for part in value)
    return replace(value, **{field.name: change(getattr(value, field.name)) for field in fields(value)})


def _present(value: Any, failures: Callable[[Any], Mapping[str, Exception]]) -> Any:
    """A nested value without what failed.

    What failed is left out of mappings and sequences. In a dataclass its field becomes None. If that field must not be
    None, the whole dataclass does. A dataclass with a field `error` keeps all of its nodes or none, and then says why.
    """
    if isinstance(value, Node):
        return None if failures(value) else value
    if (parts := _parts(value)) is None:
        return value
    if "error" in parts and is_dataclass(value):
        if not (failed := failures(value)):
            return value
        without = {name: None for name, part in parts.items() if nodes_in(part)}
        return replace(value, **without, error=one_line(next(iter(failed.values()))))  # type: ignore[type-var]
    left = _rebuilt(value, lambda part: _present(part, failures))
    if isinstance(left, Mapping):
        return {name: part for name, part in left.items() if part is not None}
    if isinstance(left, tuple):
        return tuple(part for part in left if part is not None)
    needed = [field.name for field in fields(left) if NoneType not in get_args(field.type)]
    return None if any(getattr(left, name) is None for name in needed) else left
