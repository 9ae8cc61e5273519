"""What all flows share as commands and deployments: what to print, a run's name, and the check before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.runtime import deployment, flow_run

from tailored_llama.config import RunConfig


@dataclass(frozen=True)
class Command:
    """A flow on the command line: how to check its configuration, and what to print of its report."""

    flow: Any  # takes the configuration, and returns the reference of the report
    check: Callable[[Any], None]  # checks a configuration before any work
    table: Callable[[Path], Any]  # the report's folder → its table
    page: str  # the report's page in that folder
    finished: Callable[[Any], Iterable[Path]] = lambda config: ()  # the configuration → folders of finished models


def run_name() -> str:
    """The name of a new run: flow, model, ratios and benchmarks."""
    config: RunConfig = flow_run.parameters["config"]
    model = config.model.short_name
    ratios = ", ".join(f"{ratio:.2f}" for ratio in config.pruning.ratios)
    first, *more = [benchmark.name for benchmark in config.benchmarks]
    return f"{flow_run.flow_name} {model} @ {ratios}: {first}{f' and {len(more)} more' if more else ''}"


def check_deployed(check: Callable[[Any], None], config: RunConfig) -> None:
    """Check the configuration of a deployment's run; the command line does so before it starts a run."""
    if deployment.id:
        check(config)
