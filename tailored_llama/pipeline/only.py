"""One stage of a composition alone, by its name, with what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tailored_llama.errors import InputError
from tailored_llama.pipeline.futures import Artifact
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pipeline.stage import Stage, map_leaves
from tailored_llama.store import ArtifactRef

S = TypeVar("S")


class Reached(BaseException):
    """Ends a composition of which one stage alone is wanted: it has called that, or asks for all others."""


class _Later:
    """The future of a stage that runs when it is opened, or read by the stage that is wanted."""

    def __init__(self, start: Callable[[], Artifact]) -> None:
        self.begun = cache(start)

    def result(self) -> Any:
        raise Reached  # the composition is at its end, where it asks for everything

    def failures(self) -> Iterator[tuple[str, Exception]]:
        raise Reached


class OnlyRunner:
    """Runs one stage of a composition, and of the others those that it reads; another runner executes them."""

    def __init__(self, run: Runner, only: str) -> None:
        self.run, self.only = run, only
        self.names: list[str] = []
        self.wanted: _Later | None = None

    def __call__(self, stage: Stage[S], settings: S, name: str, /, **inputs: Any) -> Artifact:
        def start() -> Artifact:
            begun = map_leaves(lambda leaf: leaf.begun() if isinstance(leaf, _Later) else leaf, inputs)
            return self.run(stage, settings, name, **begun)

        later = _Later(start)
        self.names.append(name)
        if name == self.only:
            self.wanted = later
            raise Reached
        return later

    def open(self, artifact: Artifact) -> Path:
        return self.run.open(artifact.begun() if isinstance(artifact, _Later) else artifact)


def run_only(compose: Callable[[Runner], ArtifactRef], run: Runner, only: str) -> ArtifactRef:
    """Run one stage of a composition, by its name, with what it reads.

    Raises:
        InputError: the composition has no stage of this name; the message lists those that it has.
    """
    runner = OnlyRunner(run, only)
    with suppress(Reached):
        compose(runner)
    if runner.wanted:  # not within the composition, which may go on after a failure
        reference: ArtifactRef = runner.wanted.begun().result()
        return reference
    names = "; ".join(dict.fromkeys(runner.names))
    raise InputError(f"only: got {only!r}; allowed: {names}")
