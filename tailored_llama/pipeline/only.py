"""One stage of a composition alone, by its name, with what it reads."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tailored_llama.errors import InputError
from tailored_llama.pipeline.futures import Artifact
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pipeline.stage import Stage, map_leaves
from tailored_llama.store import ArtifactRef

S = TypeVar("S")


class Reached(BaseException):
    """Ends a composition of which one stage alone is wanted: it has called that, or asks for all others."""


class _Deferred:
    """The future of a stage that runs when it is opened, or read by the stage that is wanted."""

    def __init__(self, run: Callable[[], Artifact]) -> None:
        self.start = cache(run)

    def result(self) -> NoReturn:
        raise Reached  # the composition is at its end, where it asks for everything

    def failures(self) -> NoReturn:
        raise Reached


def _start(leaf: Any) -> Any:
    return leaf.start() if isinstance(leaf, _Deferred) else leaf


class OnlyRunner:
    """Runs one stage of a composition, and of the others those that it reads; another runner executes them."""

    def __init__(self, run: Runner, only: str) -> None:
        self.run, self.only = run, only
        self.calls: dict[str, _Deferred] = {}

    def __call__(self, stage: Stage[S], settings: S, name: str, /, **inputs: Any) -> Artifact:
        call = _Deferred(lambda: self.run(stage, settings, name, **map_leaves(_start, inputs)))
        self.calls[name] = call
        if name == self.only:
            raise Reached
        return call

    def open(self, artifact: Artifact) -> Path:
        return self.run.open(_start(artifact))


def run_only(compose: Callable[[Runner], ArtifactRef], run: Runner, only: str) -> ArtifactRef:
    """Run one stage of a composition, by its name, with what it reads.

    Raises:
        InputError: the composition has no stage of this name; the message lists those that it has.
    """
    runner = OnlyRunner(run, only)
    with suppress(Reached):
        compose(runner)
    if only not in runner.calls:
        raise InputError(f"only: got {only!r}; allowed: {'; '.join(runner.calls)}")
    reference: ArtifactRef = runner.calls[only].start().result()  # here, as the composition may go on after a failure
    return reference
