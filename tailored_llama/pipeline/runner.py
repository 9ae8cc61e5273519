"""Runners: what executes the stages that a composition calls.

A composition calls `run(STAGE, settings, name, **inputs)` and gets a future, which it passes on to further stages. The
runners here work in this process: `StoreRunner` on an artifact store, `FolderRunner` on plain folders. Flows have one
that makes every stage a Prefect task.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any, Protocol, TypeVar

from tailored_llama.config import ExecutionConfig, StoreConfig, Work
from tailored_llama.console import progress_bar
from tailored_llama.pipeline.beside import run_beside, slots
from tailored_llama.pipeline.futures import Artifact, Done, Later, result
from tailored_llama.pipeline.stage import Call, Facts, Stage, run_stage
from tailored_llama.processes import check_main
from tailored_llama.progress import Progress
from tailored_llama.store import ArtifactRef, ArtifactStore, Manifest

S = TypeVar("S")

log = logging.getLogger(__name__)

ALONE = RLock()  # one thing at a time: libraries are not made to be loaded by two threads, and time is measured


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
    """Runs every stage at once, in a new folder below a scratch folder; nothing is kept, and nothing found again.

    A stage on the device waits for its turn there, as in every other run.
    """

    def __init__(self, scratch: Path, downloads: str, execution: ExecutionConfig) -> None:
        self.scratch, self.downloads, self.execution = scratch, downloads, execution
        self.facts: dict[Path, Facts] = {}

    def __call__(self, stage: Stage[S], settings: S, name: str, /, **inputs: Any) -> Artifact:
        out = self.scratch / f"{len(self.facts)}-{stage.name}"
        out.mkdir()
        label = f"{name} {time.strftime('%Y%m%d-%H%M%S')}"
        with progress_bar(name) as progress:
            work = Work(out, self.execution, self.downloads, progress, name=label)
            self.facts[out] = run_stage(stage, result(inputs), settings, work)
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
        return run_stage(stage, folders, call.settings, work)

    def is_built() -> bool:
        return artifacts.find(stage.name, call.key) is not None

    with ExitStack() as held:  # outside of what the store measures: waiting is no work
        beside = False
        if stage.on_device and execution.processes > 1:
            beside = held.enter_context(slots(execution.processes).held(call.key, is_built, stage.timed))
        if stage.timed or not stage.on_device:
            held.enter_context(ALONE)
        check()
        return artifacts.build(stage.name, stage.version, fields, inputs, partial(compute, beside))


def describe(call: Call[Any], manifest: Manifest, found: bool) -> str:
    """Say what became of a call, as one line of a log; `found`: its artifact was there."""
    line = f"{call.name}: {call.stage.name} {manifest.key[:12]}"
    if found:
        return f"{line}, found, nothing to do"
    facts = "".join(f", {name} {value}" for name, value in manifest.measured.items())
    return f"{line}, {manifest.seconds:.1f} s, peak memory {manifest.peak_memory_bytes / 1e9:.2f} GB{facts}"
