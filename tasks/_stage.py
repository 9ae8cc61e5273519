"""What every stage task does: find its artifact or build it, and say so in the Prefect UI.

The artifact store is the only cache. A task whose artifact is there ends in the state `Cached` without doing work, in
any run, on any worker, after any crash; Prefect's own result cache, which would be a second truth, is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.states import Completed, State

from tailored_llama.artifacts import ArtifactRef, ArtifactStore
from tailored_llama.config import StoreConfig
from tailored_llama.errors import InputError


@cache
def open_store(store: StoreConfig) -> ArtifactStore:
    """The store of a run; one object per process, which hashes each file once."""
    return ArtifactStore(store.root)


def stage(
    store: StoreConfig,
    name: str,
    version: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, ArtifactRef],
    function: Callable[[Path], Mapping[str, Any] | None],
) -> State[ArtifactRef]:
    """Find or build one artifact; the state carries its reference."""
    artifacts = open_store(store)
    ref, cached = artifacts.build(name, version, config, inputs, function)
    manifest = artifacts.manifest(ref)
    message = f"{name} {ref.key[:12]}"
    if cached:
        get_run_logger().info("%s: found, nothing to do", message)
    else:
        facts = ", ".join(f"{k} {v}" for k, v in manifest.measured.items())
        get_run_logger().info(
            "%s: %.1f s, peak memory %.2f GB%s",
            message,
            manifest.seconds,
            manifest.peak_memory_bytes / 1e9,
            f", {facts}" if facts else "",
        )
    return Completed(name="Cached" if cached else "Completed", message=message, data=ref)


class _NoTracebackForInput(logging.Filter):
    """An InputError's message says all there is to say: the user's value is wrong, not the code."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], InputError):
            record.exc_info = None
        return True


for _name in ("prefect.task_runs", "prefect.flow_runs", "prefect.task_engine", "prefect.flow_engine"):
    logging.getLogger(_name).addFilter(_NoTracebackForInput())

logging.getLogger("tailored_llama").setLevel(logging.INFO)  # shown by Prefect's logging.extra_loggers
