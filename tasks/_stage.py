"""What all stage tasks share: find the artifact or build it, and report that in the Prefect UI.

The artifact store is the only cache. A task whose artifact exists ends in the state `Cached` without doing work, in
any run, on any worker, after any crash. Prefect's own result cache is not used: it would be a second source of truth.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from prefect import State, Task, get_run_logger
from prefect.client.schemas.objects import TaskRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import task_run
from prefect.states import Completed

from tailored_llama.config import ExecutionConfig, RunConfig, StoreConfig
from tailored_llama.console import quiet_libraries
from tailored_llama.errors import InputError, is_transient
from tailored_llama.memory import out_of_memory
from tailored_llama.models import device_slot
from tailored_llama.progress import Progress
from tailored_llama.store import ArtifactRef, ArtifactStore, artifact_key
from tasks._progress import stage_progress
from tasks._sigterm import heed_sigterm

P = ParamSpec("P")
R = TypeVar("R")

RETRY_AFTER = (10, 60, 300)  # seconds


class StageModule(Protocol):
    """A module of the library with the name of its stage and the version of the stage's output."""

    STAGE: str
    VERSION: int


@cache
def open_store(store: StoreConfig) -> ArtifactStore:
    """The store of a run; one object per process, so that each file is hashed once."""
    return ArtifactStore(store.root)


def task(name: str, frugal: bool = False) -> Callable[[Callable[P, State[R]]], Callable[P, R]]:
    """Make a function a Prefect task that returns what its state carries; transient failures are retried.

    Running out of memory is retried only for a `frugal` stage, which follows `execution_of` and takes less the next
    time. The Prefect task itself is the function's attribute `task`.
    """

    def decorate(function: Callable[P, State[R]]) -> Callable[P, R]:
        prefect_task: Any = Task(
            function,
            task_run_name=name,
            retries=len(RETRY_AFTER),
            retry_delay_seconds=list(RETRY_AFTER),
            retry_jitter_factor=0.2,
            retry_condition_fn=partial(_is_retryable, frugal),
        )

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            result: R = prefect_task(*args, **kwargs).result()
            return result

        call.task = prefect_task  # type: ignore[attr-defined]
        return call

    return decorate


class CrashedElsewhere(ConnectionError):
    """The worker or the process that ran a stage died; another worker may run it."""


def _is_retryable(frugal: bool, task: Any, run: TaskRun, state: State[Any]) -> bool:
    """Whether a retry may succeed: memory ran out in a stage that can take less, or the failure is transient."""
    error = state.data
    if isinstance(error, Exception) and ((frugal and out_of_memory(error)) or is_transient(error)):
        return True
    if isinstance(error, Exception) and not isinstance(error, InputError):  # Prefect logs no traceback here
        get_run_logger().error("another try would not help", exc_info=error)
    return False


def reference(state: State[ArtifactRef]) -> ArtifactRef:
    """The artifact reference that a stage's state carries."""
    ref: ArtifactRef = state.result()
    return ref


@dataclass(frozen=True)
class OnDevice:
    """A stage that computes on the run's device: it waits for its turn there, or its own deployment runs it."""

    config: RunConfig
    flow: str  # in flows/stages.py
    parameters: Mapping[str, Any]  # of that flow, besides the configuration


def stage(
    module: StageModule,
    store: StoreConfig,
    fields: Mapping[str, Any],
    inputs: Mapping[str, ArtifactRef],
    function: Callable[[Path, Progress], Mapping[str, Any] | None],
    on: OnDevice | None = None,
) -> State[ArtifactRef]:
    """Find or build one artifact, here or by a deployment; the state carries its reference.

    Args:
        module: the module of the stage function, with `STAGE` and `VERSION`.
        store: where artifacts are.
        fields: the part of the configuration that the artifact depends on.
        inputs: the artifacts that it is made from.
        function: writes the files into a folder and reports its progress.
        on: only for a stage that computes on the run's device.
    """
    artifacts, name, version = open_store(store), module.STAGE, module.VERSION
    dispatched = on is not None and _dispatched(on, artifacts, name, artifact_key(name, version, fields, inputs))
    with stage_progress(str(task_run.name or name)) as progress:

        def build(out: Path) -> Mapping[str, Any] | None:
            if not on:
                return function(out, progress)
            with device_slot(on.config.execution, store.downloads):
                return function(out, progress)

        ref, cached = artifacts.build(name, version, fields, inputs, build)
    manifest = artifacts.manifest(ref)
    message = f"{name} {ref.key[:12]}"
    if cached:
        get_run_logger().info("%s: %s", message, "built by a deployment" if dispatched else "found, nothing to do")
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


def _dispatched(on: OnDevice, artifacts: ArtifactStore, name: str, key: str) -> bool:
    """Let the stage's deployment build the artifact if it has to; return whether it did."""
    execution = on.config.execution
    if not execution.dispatch or artifacts.find(name, key):
        return False
    config = computed_here(on.config).model_dump(mode="json")
    deployment = f"{on.flow}/{execution.dispatch}"
    flow_run_name = f"{task_run.name}, {on.config.model.short_name}"  # the name that its flow gives itself
    try:
        run: Any = run_deployment(
            deployment, parameters={"config": config, **on.parameters}, flow_run_name=flow_run_name, poll_interval=2
        )
    except ObjectNotFound:
        raise InputError(
            f"execution.dispatch: got {execution.dispatch!r}, but there is no deployment {deployment}; allowed: a name "
            "that `prefect deployment ls` shows"
        ) from None
    if run.state is None or not run.state.is_completed():
        message = (
            f"{deployment}: flow run {run.name} ended {run.state and run.state.name}: {run.state and run.state.message}"
        )
        raise CrashedElsewhere(message) if run.state and run.state.is_crashed() else RuntimeError(message)
    if not artifacts.find(name, key):
        raise InputError(
            f"execution.dispatch: {deployment} completed, but store.root {artifacts.root} has no {name} {key[:12]}; "
            "allowed: a deployment with the same store and the same version of the code"
        )
    return True


def computed_here(config: RunConfig) -> RunConfig:
    """The configuration for a process that computes every stage itself, not in a deployment."""
    return config.model_copy(update={"execution": config.execution.model_copy(update={"dispatch": None})})


def execution_of(config: RunConfig) -> ExecutionConfig:
    """The run's execution settings; every retry of a task takes less memory."""
    tries = task_run.run_count or 1
    if tries == 1:
        return config.execution
    budget = max(64, (config.execution.batch_tokens or 2048) // 2 ** (tries - 1))
    return config.execution.model_copy(update={"batch_tokens": budget, "recompute_activations": True})


class _NoTracebackForInput(logging.Filter):
    """Drop the traceback of an InputError: its message is complete, as the user's value is wrong, not the code."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], InputError):
            record.exc_info = None
        return True


for _name in ("prefect.task_runs", "prefect.flow_runs", "prefect.task_engine", "prefect.flow_engine"):
    logging.getLogger(_name).addFilter(_NoTracebackForInput())

quiet_libraries()
logging.getLogger("tailored_llama").setLevel(logging.INFO)  # shown by Prefect's logging.extra_loggers

heed_sigterm()
