"""What flows have in common beside their stages: names of runs, checks, and the command line.

python -m flows.NAME CONFIG.toml [--set key=value …]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Thread
from typing import Any

from prefect.runtime import deployment, flow_run
from rich.console import Console

from tailored_llama.config import RunConfig
from tailored_llama.errors import InputError
from tailored_llama.preflight import preflight
from tasks._stage import open_store


def run_name() -> str:
    """Name of a run that is about to begin: flow, model, ratios and benchmarks."""
    config: RunConfig = flow_run.parameters["config"]
    model = config.model.short_name
    ratios = ", ".join(f"{ratio:.2f}" for ratio in config.pruning.ratios)
    first, *more = [benchmark.name for benchmark in config.benchmarks]
    return f"{flow_run.flow_name} {model} @ {ratios}: {first}{f' and {len(more)} more' if more else ''}"


def check_deployed(check: Callable[[Any], None], config: RunConfig) -> None:
    """Check the configuration of a deployment's run; the command line has done so before it started one."""
    if deployment.id:
        check(config)


def run_flow(
    flow: Any,
    load: Callable[[str, list[str]], Any],
    table: Callable[[Path], Any],
    page: str,
    arguments: list[str] | None,
    server: Thread | None,
    example: str,
    check: Callable[[Any], None] = preflight,
    more: Callable[[Any], Iterable[str]] = lambda config: (),
) -> int:
    """Run a flow from a configuration file; print its table and where its report is.

    Args:
        flow: takes the configuration, and returns the reference of the report.
        load: a file and its overrides → the configuration.
        table: the report's folder → what is printed of it.
        page: name of the report's page in that folder.
        arguments: of the command line; None: the process's own.
        server: the thread that connects to Prefect, joined before the flow runs.
        example: a configuration file to name in the help.
        check: what a configuration must pass before any work.
        more: the configuration → lines to print last.

    Returns:
        The exit status: 0, or 2 for bad input.
    """
    parser = argparse.ArgumentParser(prog=f"python -m flows.{flow.name}", description=flow.__doc__)
    parser.add_argument("config", help=f"{flow.name} configuration, a TOML file such as {example}")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one field")
    options = parser.parse_args(arguments)
    try:
        config: RunConfig = load(options.config, options.set)
        check(config)
        if server:
            server.join()
        ref = flow(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = open_store(config.store).open(ref)
    Console().print(table(folder))
    print(f"report: {folder / page}", *more(config), sep="\n")
    return 0
