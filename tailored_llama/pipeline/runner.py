"""Runners: what executes the stages that a composition calls.

A composition calls `run(STAGE, settings, name, **inputs)` and gets a future, which it passes on to further stages. The
runners here work in this process: `StoreRunner` on an artifact store, `FolderRunner` on plain folders. Flows have one
that makes every stage a Prefect task.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Generic, Protocol, TypeVar

from tailored_llama.config import ExecutionConfig, StoreConfig, Work
from tailored_llama.console import progress_bar
from tailored_llama.errors import one_line
from tailored_llama.pipeline.beside import places, run_beside
from tailored_llama.pipeline.stage import Call, Facts, Stage, is_container, leaves, map_leaves, run_here
from tailored_llama.processes import check_main
from tailored_llama.progress import Progress
from tailored_llama.store import ArtifactRef, ArtifactStore, Manifest

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")

log = logging.getLogger(__name__)

_ALONE = Lock()  # one thing at a time: libraries are not made to be loaded by two threads, and time is measured


class Future(Protocol[R_co]):
    """What a stage returns, now or later."""

    def result(self) -> R_co:
        """Wait for the result; a failure is raised, also that of a stage before this one."""

    def failures(self) -> Iterator[tuple[str, Exception]]:
        """Wait; the stages that failed, by name, of this one and those before it."""


class Done(Generic[R]):
    """The future of a stage that has succeeded."""

    def __init__(self, value: R) -> None:
        self._value = value

    def result(self) -> R:
        return self._value

    def failures(self) -> Iterator[tuple[str, Exception]]:
        return iter(())


Artifact = Future[Any]  # of a reference into the store, or of a folder: compositions only pass it on, or open it


class Runner(Protocol):
    """Executes stages."""

    def __call__(self, stage: Stage[S], settings: S, name: str, /, **inputs: Any) -> Artifact:
        """Find or build the artifact of a stage.

        Args:
            stage: what to run.
            settings: its settings.
            name: how to show the call to people, such as `tune arc_easy @ 0.20`.
            inputs: the artifacts that it reads, by parameter of its function.
        """

    def open(self, artifact: Artifact) -> Path:
        """Wait for an artifact, and return its folder, verified."""


class Cancelled(RuntimeError):
    """The run was cancelled while one of its stages was under way."""


class IncompleteRun(RuntimeError):
    """Raised at the end of a run of which some stages failed.

    Args:
        failed: each failure, by the name of its stage or of the cell that lacks it.
        report: the reference of the report of what there is, if there is one.
    """

    def __init__(self, failed: Mapping[str, Exception], report: ArtifactRef | None = None) -> None:
        self.failed, self.report = failed, report
        super().__init__("; ".join(f"{name}: {error}" for name, error in failed.items()))


class Later(Generic[R]):
    """The future of a stage that a thread waits for; the thread ends with this process.

    Args:
        name: how the stage is shown to people.
        inputs: what it reads; its own failure is that of the first of them that failed.
        make: finds or builds the artifact.
    """

    def __init__(self, name: str, inputs: Mapping[str, Any], make: Callable[[], R]) -> None:
        self.name, self.inputs, self._made = name, inputs, futures.Future[R]()
        Thread(target=self._run, args=(make,), daemon=True).start()

    def _run(self, make: Callable[[], R]) -> None:
        try:
            self._made.set_result(make())
        except BaseException as error:  # a library in Rust panics with one; nothing must wait forever
            self._made.set_exception(error)

    def result(self) -> R:
        return self._made.result()

    def failures(self) -> Iterator[tuple[str, Exception]]:
        if isinstance(error := self._made.exception(), Exception):
            yield from failures(self.inputs).items() or [(self.name, error)]


class StoreRunner:
    """Runs every stage in this process, one after another, or some side by side (`execution.processes`).

    What is in the store is not computed again.
    """

    def __init__(self, store: StoreConfig, execution: ExecutionConfig) -> None:
        self.artifacts, self.downloads, self.execution = ArtifactStore(store.root), store.downloads, execution

    def __call__(self, stage: Stage[S], settings: S, name: str, /, **inputs: Any) -> Artifact:
        def make() -> ArtifactRef:
            call = Call(stage, settings, result(inputs), name)
            with progress_bar(name) as progress:
                ref, found = build(call, self.artifacts, self.downloads, self.execution, progress)
            log.info("%s", describe(call, self.artifacts.manifest(ref), found))
            return ref

        return Done(make()) if self.execution.processes == 1 else Later(name, inputs, make)

    def open(self, artifact: Artifact) -> Path:
        return self.artifacts.open(artifact.result())


class FolderRunner:
    """Runs every stage at once, in a new folder below a scratch folder; nothing is kept, and nothing found again."""

    def __init__(self, scratch: Path, downloads: str, execution: ExecutionConfig) -> None:
        self.scratch, self.downloads, self.execution = scratch, downloads, execution
        self.facts: dict[Path, Facts] = {}

    def __call__(self, stage: Stage[S], settings: S, name: str, /, **inputs: Any) -> Artifact:
        out = self.scratch / f"{len(self.facts)}-{stage.name}"
        out.mkdir()
        label = f"{name} {time.strftime('%Y%m%d-%H%M%S')}"
        with progress_bar(name) as progress:
            work = Work(out, self.execution, self.downloads, progress, name=label)
            self.facts[out] = stage.load()(**result(inputs), settings=settings, work=work)
        return Done(out)

    def open(self, artifact: Artifact) -> Path:
        folder: Path = artifact.result()
        return folder

    def move(self, artifact: Artifact, out: Path) -> Mapping[str, Any]:
        """Move an artifact's files to an existing empty folder; returns what its stage measured."""
        folder = self.open(artifact)
        for file in folder.iterdir():
            shutil.move(file, out / file.name)
        return self.facts[folder] or {}


def build(
    call: Call[Any],
    artifacts: ArtifactStore,
    downloads: str,
    execution: ExecutionConfig,
    progress: Progress,
    check: Callable[[], None] = check_main,
) -> tuple[ArtifactRef, bool]:
    """Find or build the artifact of a call; returns its reference, and whether it was there.

    A stage on the device waits for its turn there, and runs in a process of its own where some run side by side.

    Raises:
        Exception: what the stage raised, or `check`, which a process of its own calls now and then.
    """
    stage, fields, inputs = call.stage, call.fields, call.references

    def compute(beside: bool, out: Path) -> Facts:
        resume = artifacts.resume_folder(stage.name, stage.version, fields, inputs)
        work = Work(out, execution, downloads, progress, resume, f"{call.name} {call.key[:8]}")
        folders = call.open_inputs(artifacts.open)
        if beside:
            return run_beside(stage, folders, call.settings, work, check)
        return run_here(stage, folders, call.settings, work)

    def is_built() -> bool:
        return artifacts.find(stage.name, call.key) is not None

    with ExitStack() as held:
        beside = False
        if stage.on_device and execution.processes > 1:
            beside = held.enter_context(places(execution.processes).taken(call.key, is_built, stage.timed))
        if stage.timed or not stage.on_device:
            held.enter_context(_ALONE)
        check()
        return artifacts.build(stage.name, stage.version, fields, inputs, partial(compute, beside))


def describe(call: Call[Any], manifest: Manifest, found: bool) -> str:
    """What became of a call, as one line of a log; `found`: its artifact was there."""
    line = f"{call.name}: {call.stage.name} {manifest.key[:12]}"
    if found:
        return f"{line}, found, nothing to do"
    facts = "".join(f", {name} {value}" for name, value in manifest.measured.items())
    return f"{line}, {manifest.seconds:.1f} s, peak memory {manifest.peak_memory_bytes / 1e9:.2f} GB{facts}"


def result(value: T) -> T:
    """A value with every future in it replaced by its result; within dataclasses, mappings and sequences, too.

    Raises:
        Exception: the first failure.
    """
    found: T = map_leaves(lambda leaf: leaf.result() if hasattr(leaf, "failures") else leaf, value)
    return found


def failures(value: Any) -> dict[str, Exception]:
    """The stages that failed of all that a value is made of, by name; waits for all of them.

    Raises:
        Cancelled: the run was cancelled meanwhile.
    """
    futures = [leaf for _, leaf in leaves(value) if hasattr(leaf, "failures")]
    found = {name: error for future in futures for name, error in future.failures()}
    if cancelled := next((error for error in found.values() if isinstance(error, Cancelled)), None):
        raise cancelled
    return found


def succeeded(value: Any) -> bool:
    """Whether a value has all its parts; waits for all of them."""
    return value is not None and not failures(value)


def surviving(value: Any) -> Any:
    """What has not failed of nested values, or None; waits for all of it.

    Mappings and sequences lose what failed. In a dataclass it is None, and without a part that must be there, the whole
    is None.
    """
    if value is None or hasattr(value, "failures"):
        return value if succeeded(value) else None
    if isinstance(value, Mapping):
        return {name: part for name, own in value.items() if (part := surviving(own)) is not None}
    if isinstance(value, list):
        return [part for own in value if (part := surviving(own)) is not None]
    if not is_container(value):
        return value
    parts = {field.name: surviving(getattr(value, field.name)) for field in fields(value)}
    lost = any(parts[field.name] is None and not str(field.type).endswith("None") for field in fields(value))
    return None if lost else replace(value, **parts)


def attempt(name: str, build: Callable[[], T]) -> T | Exception:
    """What a part of a study that may fail alone is made of, or the error that ended it in this process."""
    try:
        return build()
    except Exception as error:
        log.error("%s failed: %s", name, error)
        return error


def settle(attempts: Iterable[tuple[str, Any, Any]]) -> tuple[list[Any], dict[str, Exception]]:
    """Wait for the rows of a study, with all stages that they are made of.

    Args:
        attempts: a name; an empty row, to which a failure adds its `error`; and what came of the whole one.

    Returns:
        The rows, and the failures by name.

    Raises:
        Cancelled: the run was cancelled meanwhile.
    """
    rows, failed = [], dict[str, Exception]()
    for name, row, outcome in attempts:
        try:
            if isinstance(outcome, Exception):
                raise outcome
            result(outcome)
            rows.append(outcome)
        except Cancelled:
            raise
        except Exception as error:
            failed[name] = error
            rows.append(replace(row, error=one_line(error)))
    return rows, failed


def conclude(report: Artifact | None, failed: Mapping[str, Exception]) -> ArtifactRef:
    """The reference of a run's report.

    Raises:
        IncompleteRun: stages failed.
    """
    written = report.result() if report is not None and succeeded(report) else None
    if failed or written is None:
        raise IncompleteRun(failed, written)
    reference: ArtifactRef = written
    return reference
