"""What all stage tasks share: find the artifact or build it, and report that in the Prefect UI.

The artifact store is the only cache. A task whose artifact exists ends in the state `Cached` without doing work, in
any run, on any worker, after any crash. Prefect's own result cache is not used: it would be a second source of truth.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from prefect import State, get_run_logger
from prefect.runtime import task_run
from prefect.states import Completed

from tailored_llama.config import ExecutionConfig, RunConfig, StoreConfig
from tailored_llama.console import quiet_libraries
from tailored_llama.errors import InputError
from tailored_llama.models import device_slot
from tailored_llama.progress import Progress
from tailored_llama.store import ArtifactRef, ArtifactStore, artifact_key
from tasks._dispatch import dispatch
from tasks._progress import stage_progress
from tasks._sigterm import heed_sigterm
from tasks._task import IncompleteRun, task

__all__ = ["execution_of", "open_store", "reference", "stage", "task"]


class StageModule(Protocol):
    """A module of the library with the name of its stage and the version of the stage's output."""

    STAGE: str
    VERSION: int


@cache
def open_store(store: StoreConfig) -> ArtifactStore:
    """The store of a run; one object per process, so that each file is hashed once."""
    return ArtifactStore(store.root)


def reference(state: State[ArtifactRef]) -> ArtifactRef:
    """The artifact reference that a stage's state carries."""
    ref: ArtifactRef = state.result()
    return ref


def stage(
    module: StageModule,
    store: StoreConfig,
    fields: Mapping[str, Any],
    inputs: Mapping[str, ArtifactRef],
    function: Callable[[Path, Progress], Mapping[str, Any] | None],
    on: RunConfig | None = None,
    short: bool = False,
) -> State[ArtifactRef]:
    """Find or build one artifact, here or on a worker; the state carries its reference.

    Args:
        module: the module of the stage function, with `STAGE` and `VERSION`.
        store: where artifacts are.
        fields: the part of the configuration that the artifact depends on.
        inputs: the artifacts that it is made from.
        function: writes the files into a folder and reports its progress.
        on: the run's configuration, only for a stage that computes on the run's device: it waits for its turn there,
            or is left to a worker.
        short: workers share out the stages of this kind that are ready at once, instead of starting a process for each.
    """
    artifacts, name, version = open_store(store), module.STAGE, module.VERSION
    key = artifact_key(name, version, fields, inputs)
    dispatched = on is not None and _dispatched(on, artifacts, name, key, short)
    with stage_progress(str(task_run.name or name)) as progress:

        def build(out: Path) -> Mapping[str, Any] | None:
            if not on:
                return function(out, progress)
            with device_slot(on.execution, store.downloads):
                return function(out, progress)

        ref, cached = artifacts.build(name, version, fields, inputs, build)
    manifest = artifacts.manifest(ref)
    message = f"{name} {ref.key[:12]}"
    if cached:
        get_run_logger().info("%s: %s", message, "built by a worker" if dispatched else "found, nothing to do")
    else:
        facts = ", ".join(f"{k} {v}" for k, v in manifest.measured.items())
        get_run_logger().info(
            "%s: %.1f s, peak memory %.2f GB%s",
            message,
            manifest.seconds,
            manifest.peak_memory_bytes / 1e9,
            f", {facts}" if facts else "",
        )
    state_name = "Dispatched" if dispatched else "Cached" if cached else "Completed"
    return Completed(name=state_name, message=message, data=ref)


def _dispatched(config: RunConfig, artifacts: ArtifactStore, name: str, key: str, short: bool) -> bool:
    """Have a worker build the artifact if the configuration says so and it is not there; return whether one did."""
    if not config.execution.dispatch or artifacts.find(name, key):
        return False
    dispatch(config, lambda: artifacts.find(name, key) is not None, shared=short)
    if not artifacts.find(name, key):
        raise InputError(
            f"execution.dispatch: {config.execution.dispatch} completed, but store.root {artifacts.root} has no {name} "
            f"{key[:12]}; allowed: a deployment with the same store and the same version of the code"
        )
    return True


def execution_of(config: RunConfig) -> ExecutionConfig:
    """The run's execution settings; every retry of a task takes less memory."""
    tries = task_run.run_count or 1
    if tries == 1:
        return config.execution
    budget = max(64, (config.execution.batch_tokens or 2048) // 2 ** (tries - 1))
    return config.execution.model_copy(update={"batch_tokens": budget, "recompute_activations": True})


class _NoTracebackForInput(logging.Filter):
    """Drop the traceback where the message is complete: the user's value is wrong, or a stage has logged its own."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], InputError | IncompleteRun):
            record.exc_info = None
        return True


for _name in ("prefect.task_runs", "prefect.flow_runs", "prefect.task_engine", "prefect.flow_engine"):
    logging.getLogger(_name).addFilter(_NoTracebackForInput())

quiet_libraries()
logging.getLogger("tailored_llama").setLevel(logging.INFO)  # shown by Prefect's logging.extra_loggers

heed_sigterm()
