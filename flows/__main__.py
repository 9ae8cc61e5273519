"""Run a flow from a configuration file: python -m flows NAME CONFIG.toml [--set KEY=VALUE …]."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread, Timer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows._command import Command

ABOUT = {
    "tailor": "Prune, tailor, score and report: the whole pipeline.",
    "sweep": "Measure every cell of a grid of settings, and draw the curves.",
    "transfer": "Score the adapter of each benchmark on all benchmarks.",
    "prompts": "Choose a template set on train examples, and report it on the evaluation split.",
}
EXAMPLES = {
    "tailor": "data/quickstart.toml",
    "sweep": "data/sweep.toml",
    "transfer": "data/transfer.toml",
    "prompts": "data/prompts-study.toml",
}
LAST_WORDS = 60.0  # seconds that Prefect has, after a run, to send its events to the server


def main(arguments: list[str] | None = None, connect: bool = False) -> int:
    """Run a flow; print its table, the report's location, and the folders of finished models.

    Args:
        arguments: command-line arguments; None: the process's own.
        connect: connect to Prefect's API while the libraries load; for a process that runs only this flow.

    Returns:
        The exit status: 0; 1 if stages failed; or 2 for bad input.
    """
    options = _parse(arguments)

    from tailored_llama.errors import InputError, one_line

    try:
        config = load(options.name, options.config, options.set)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    server = _reach_server() if connect else None
    command = _command(options.name)

    from rich.console import Console

    from tasks._pages import place_report, report_target
    from tasks._task import IncompleteRun

    failed: dict[str, Exception] = {}
    try:
        command.check(config)
        target = report_target(config.store, Path(options.config).stem)
        if server:
            server.join()
        report = command.flow(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except IncompleteRun as error:
        report, failed = error.report, dict(error.failed)
        for name, cause in failed.items():
            print(f"error: {name}: {one_line(cause)}", file=sys.stderr)
        if report is None:
            return 1
    folder = place_report(config.store, report, target)
    Console().print(command.table(folder))
    print(f"report: {folder / command.page}")
    for model in command.finished(config) if not failed else ():
        print(f"model: {model}")
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; --help and a wrong name answer before any library is loaded."""
    parser = argparse.ArgumentParser(prog="python -m flows", description="Run a flow from a configuration file.")
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, about in ABOUT.items():
        flow = names.add_parser(name, help=about, description=about)
        flow.add_argument("config", metavar="CONFIG", help=f"a TOML file such as {EXAMPLES[name]}")
        flow.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one field")
    return parser.parse_args(arguments)


def load(name: str, file: str, overrides: list[str]) -> Any:
    """Read the configuration of a flow, without loading Prefect or torch, so that a wrong value is refused at once.

    Raises:
        InputError: the file cannot be read, or a value is wrong.
    """
    from tailored_llama.config import load_config, load_study, load_sweep, load_transfer

    loaders = {"tailor": load_config, "sweep": load_sweep, "transfer": load_transfer, "prompts": load_study}
    return loaders[name](file, overrides)


def _command(name: str) -> Command:
    from flows import prompts, sweep, tailor, transfer

    return {"tailor": tailor.COMMAND, "sweep": sweep.COMMAND, "transfer": transfer.COMMAND, "prompts": prompts.COMMAND}[
        name
    ]


def _reach_server() -> Thread:
    """Connect to Prefect in the background; without PREFECT_API_URL, Prefect starts a temporary server.

    Connecting takes seconds, as does loading the libraries. Join the thread before a flow runs. A failure is not
    reported here: the flow fails in the same way and reports it.
    """
    from prefect.client.orchestration import get_client

    # Prefect passes a SIGTERM on to this handler. The signal's default action would end the process without Python's
    # exit handlers and leave the temporary server running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    def connect() -> None:
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:
            client.hello()

    thread = Thread(target=connect, daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def _leaving() -> Iterator[None]:
    """End the process soon after the block, which ends in `sys.exit`.

    Prefect keeps the process alive until every event of the run is sent, and tries each for two minutes. A server that
    hangs would hold up a finished run for hours: a minute must do. Exit handlers run in reverse order, so that ours
    comes after Prefect's. It skips Python's taking the libraries apart, which is seconds.
    """
    status = 1
    atexit.register(lambda: _leave(status))
    try:
        yield
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        raise
    finally:
        timer = Timer(LAST_WORDS, _leave, (status,))
        timer.daemon = True
        timer.start()


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    with _leaving():
        sys.exit(main(connect=True))
