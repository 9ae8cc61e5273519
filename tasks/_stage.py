"""What every stage task does: find its artifact or build it, and say so in the Prefect UI.

The artifact store is the only cache. A task whose artifact is there ends in the state `Cached` without doing work, in
any run, on any worker, after any crash; Prefect's own result cache, which would be a second truth, is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import prefect
from prefect import get_run_logger
from prefect.client.schemas.objects import TaskRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import task_run
from prefect.states import Completed, State

from tailored_llama.artifacts import ArtifactRef, ArtifactStore, artifact_key
from tailored_llama.config import ExecutionConfig, RunConfig, StoreConfig
from tailored_llama.console import quiet_libraries
from tailored_llama.errors import InputError, is_passing
from tailored_llama.memory import out_of_memory
from tailored_llama.slots import device_slot
from tasks._sigterm import heed_sigterm

RETRY_AFTER = (10, 60, 300)  # seconds


@cache
def open_store(store: StoreConfig) -> ArtifactStore:
    """The store of a run; one object per process, which hashes each file once."""
    return ArtifactStore(store.root)


def task(name: str, frugal: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """A stage's Prefect task: its runs bear `name`, and are tried again where that may help.

    After memory ran out that is where the stage is `frugal`: it heeds `execution_of`, and takes less the next time.
    """
    return prefect.task(
        task_run_name=name,
        retries=len(RETRY_AFTER),
        retry_delay_seconds=list(RETRY_AFTER),
        retry_jitter_factor=0.2,
        retry_condition_fn=partial(_may_pass, frugal),
    )


class CrashedElsewhere(ConnectionError):
    """The worker that ran a stage, or its process, died: another may do it."""


def _may_pass(frugal: bool, task: Any, run: TaskRun, state: State[Any]) -> bool:
    """Whether what ended a try may not end the next: memory ran out for what can take less, or the network failed."""
    error = state.data
    if isinstance(error, Exception) and ((frugal and out_of_memory(error)) or is_passing(error)):
        return True
    if isinstance(error, Exception) and not isinstance(error, InputError):  # Prefect says no word of where it was
        get_run_logger().error("another try would not help", exc_info=error)
    return False


@dataclass(frozen=True)
class OnDevice:
    """A stage that computes on the run's device: it may have that alone, or be run by a deployment of its own."""

    config: RunConfig
    flow: str  # in flows/stages.py
    parameters: Mapping[str, Any]  # of that flow, beside the configuration


def stage(
    store: StoreConfig,
    name: str,
    version: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, ArtifactRef],
    function: Callable[[Path], Mapping[str, Any] | None],
    on: OnDevice | None = None,
) -> State[ArtifactRef]:
    """Find or build one artifact, here or by a deployment; the state carries its reference."""
    artifacts = open_store(store)
    dispatched = on is not None and _dispatched(on, artifacts, name, artifact_key(name, version, config, inputs))

    def build(out: Path) -> Mapping[str, Any] | None:
        if not on:
            return function(out)
        with device_slot(on.config.execution, store.downloads):
            return function(out)

    ref, cached = artifacts.build(name, version, config, inputs, build)
    manifest = artifacts.manifest(ref)
    message = f"{name} {ref.key[:12]}"
    if cached:
        get_run_logger().info("%s: %s", message, "made elsewhere" if dispatched else "found, nothing to do")
    else:
        facts = ", ".join(f"{k} {v}" for k, v in manifest.measured.items())
        get_run_logger().info(
            "%s: %.1f s, peak memory %.2f GB%s",
            message,
            manifest.seconds,
            manifest.peak_memory_bytes / 1e9,
            f", {facts}" if facts else "",
        )
    ended = "Dispatched" if dispatched else "Cached" if cached else "Completed"
    return Completed(name=ended, message=message, data=ref)


def _dispatched(on: OnDevice, artifacts: ArtifactStore, name: str, key: str) -> bool:
    """Whether the stage's deployment had to make the artifact, and has."""
    execution = on.config.execution
    if not execution.dispatch or artifacts.find(name, key):
        return False
    config = computed_here(on.config).model_dump(mode="json")
    deployment = f"{on.flow}/{execution.dispatch}"
    name_there = f"{task_run.name}, {on.config.model.short_name}"  # as its flow will name it
    try:
        run = run_deployment(
            deployment, parameters={"config": config, **on.parameters}, flow_run_name=name_there, poll_interval=2
        )
    except ObjectNotFound:
        raise InputError(
            f"execution.dispatch: got {execution.dispatch!r}, and there is no deployment {deployment}; allowed: a name "
            "that `prefect deployment ls` shows"
        ) from None
    if run.state is None or not run.state.is_completed():
        said = (
            f"{deployment}: flow run {run.name} ended {run.state and run.state.name}: {run.state and run.state.message}"
        )
        raise CrashedElsewhere(said) if run.state and run.state.is_crashed() else RuntimeError(said)
    if not artifacts.find(name, key):
        raise InputError(
            f"execution.dispatch: {deployment} has completed, and store.root {artifacts.root} holds no {name} "
            f"{key[:12]}; allowed: one store, and one version of the code, for both"
        )
    return True


def computed_here(config: RunConfig) -> RunConfig:
    """The configuration for a process that leaves no stage to a deployment."""
    return config.model_copy(update={"execution": config.execution.model_copy(update={"dispatch": None})})


def execution_of(config: RunConfig) -> ExecutionConfig:
    """The run's execution settings; at every further try of a task, those that take less memory."""
    tries = task_run.run_count or 1
    if tries == 1:
        return config.execution
    budget = max(64, (config.execution.batch_tokens or 2048) // 2 ** (tries - 1))
    return config.execution.model_copy(update={"batch_tokens": budget, "recompute_activations": True})


class _NoTracebackForInput(logging.Filter):
    """An InputError's message says all there is to say: the user's value is wrong, not the code."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], InputError):
            record.exc_info = None
        return True


for _name in ("prefect.task_runs", "prefect.flow_runs", "prefect.task_engine", "prefect.flow_engine"):
    logging.getLogger(_name).addFilter(_NoTracebackForInput())

quiet_libraries()
logging.getLogger("tailored_llama").setLevel(logging.INFO)  # shown by Prefect's logging.extra_loggers

heed_sigterm()
