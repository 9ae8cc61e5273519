"""Stages: a name, a version, and a function from input artifacts and settings to one artifact.

All that the function receives enters the key, but for what cannot change its bytes.
"""

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from tailored_llama import models
from tailored_llama.config import Work
from tailored_llama.memory import without_gc
from tailored_llama.store import ArtifactRef, artifact_key

S = TypeVar("S")
Facts = Mapping[str, Any] | None  # what a stage measured; it goes into the manifest and into no file


@dataclass(frozen=True)
class Stage(Generic[S]):
    """A step of the path of the data.

    `load` returns its function, so that a stage whose artifact is found loads no library. Keyword arguments of the
    function are the input artifacts' folders (or mappings and dataclasses of them), `settings` and `work`.
    """

    name: str  # also of its artifacts' folder in the store
    version: int  # raised when the output changes
    load: Callable[[], Callable[..., Facts]]
    settings: type[S]  # which is frozen; NoneType: it depends on its inputs alone
    on_device: bool = False  # it computes on the run's device, and waits for its turn there
    timed: bool = False  # it measures time; any other on the device takes less memory when it is tried again
    shared: bool = False  # workers share out the calls that are ready at once, instead of starting a process for each

    def function(self) -> Callable[..., Facts]:
        """The function, with the libraries that it needs; what these consist of is never searched for garbage."""
        is_first = "transformers" not in sys.modules
        with without_gc():
            function = self.load()
        if is_first:
            gc.freeze()
        return function


@dataclass(frozen=True)
class Call(Generic[S]):
    """A stage with its settings and inputs: all that one artifact is made from.

    `inputs` are artifacts by parameter of the stage's function: a reference, None, or a mapping, sequence or dataclass
    of them. `name` is how the call is shown to people, such as `tune arc_easy @ 0.20`.
    """

    stage: Stage[S]
    settings: S
    inputs: Mapping[str, Any]
    name: str

    @property
    def references(self) -> dict[str, ArtifactRef]:
        """Every input artifact by its label, such as `prompts arc_easy`."""
        return {label: leaf for label, leaf in flatten(self.inputs) if isinstance(leaf, ArtifactRef)}

    @property
    def fields(self) -> dict[str, Any]:
        """The settings, and whatever values stand among the inputs, as JSON."""
        values = {label: as_json(leaf) for label, leaf in flatten(self.inputs) if not isinstance(leaf, ArtifactRef)}
        return (as_json(self.settings) or {}) | ({"inputs": values} if values else {})

    @property
    def key(self) -> str:
        """The key of the artifact."""
        return artifact_key(self.stage.name, self.stage.version, self.fields, self.references)

    def open_inputs(self, open_reference: Callable[[ArtifactRef], Path]) -> dict[str, Any]:
        """The inputs with a folder in place of every reference."""
        opened = map_leaves(lambda leaf: open_reference(leaf) if isinstance(leaf, ArtifactRef) else leaf, self.inputs)
        return dict(opened)


def run_stage(stage: Stage[S], inputs: Mapping[str, Any], settings: S, work: Work) -> Facts:
    """Run a stage's function on the folders of its inputs; on the device it waits for its turn."""
    function = stage.function()
    with models.device_slot(work.execution, work.downloads) if stage.on_device else nullcontext():
        return function(**inputs, settings=settings, work=work)


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


def flatten(value: Any, label: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested mappings, sequences and dataclasses, each with a label; None is left out.

    A label is the path to the leaf. In a sequence it has the part's attribute `label`, or else its position.
    """
    if value is None:
        return []
    if isinstance(value, Mapping):
        parts = [(str(name), part) for name, part in value.items()]
    elif is_container(value):
        parts = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        parts = [(str(getattr(part, "label", i)), part) for i, part in enumerate(value)]
    else:
        return [(label, value)]
    return [leaf for name, part in parts for leaf in flatten(part, f"{label} {name}".strip())]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same nested value with every leaf replaced by a function's value of it; None stays."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {name: map_leaves(function, part) for name, part in value.items()}
    if is_container(value):
        parts = {field.name: map_leaves(function, getattr(value, field.name)) for field in fields(value)}
        return replace(value, **parts)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map_leaves(function, part) for part in value)
    return function(value)


def is_container(value: Any) -> bool:
    """Return whether a value is a dataclass that holds artifacts, not one itself."""
    return is_dataclass(value) and not isinstance(value, ArtifactRef | type)
