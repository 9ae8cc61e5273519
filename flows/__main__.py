"""Run a flow from a configuration file: python -m flows NAME CONFIG.toml [--set KEY=VALUE …]."""

import argparse
import atexit
import os
import signal
import sys
from threading import Timer
from typing import Any

from tailored_llama.pipeline import COMPOSITIONS, Composition, run_composition
from tailored_llama.store import ArtifactRef

LAST_WORDS = 60.0  # seconds that Prefect has, after a run, to send its events to the server


def main(arguments: list[str] | None = None) -> int:
    """Run a flow, and print its table and where its report and models are.

    Returns:
        The exit status: 0; 1 if stages failed; or 2 for bad input.
    """
    parser = argparse.ArgumentParser(prog="python -m flows", description="Run a flow from a configuration file.")
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, composition in COMPOSITIONS.items():
        flow = names.add_parser(name, help=composition.about, description=composition.about)
        flow.add_argument("config", metavar="CONFIG", help=f"a TOML file such as {composition.example}")
        flow.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one field")
        flow.add_argument("--only", metavar="STAGE", help="run one stage alone, such as 'tune arc_easy @ 0.20'")
    options = parser.parse_args(arguments)

    def execute(composition: Composition, config: Any) -> ArtifactRef:
        from flows.compositions import FLOWS  # with Prefect, which takes a second that a wrong value need not wait for

        return FLOWS[options.name](config, options.only)

    return run_composition(options.name, options.config, options.set, execute)


def run_and_leave() -> None:
    """Run a flow, and end the process with its status at most `LAST_WORDS` later.

    Prefect keeps the process alive until every event of the run is sent, and tries each for two minutes: a server that
    hangs would hold up a finished run for hours. Exit handlers run in reverse order, so that ours comes after
    Prefect's. It skips Python's taking the libraries apart, which is seconds.
    """
    status = 1
    atexit.register(lambda: _leave(status))
    try:
        status = main()
    except SystemExit as end:  # of the parser, or after a SIGTERM
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    finally:
        timer = Timer(LAST_WORDS, lambda: _leave(status))
        timer.daemon = True
        timer.start()
    sys.exit(status)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    # Prefect passes a SIGTERM on to this handler. The signal's default action would end the process without Python's
    # exit handlers and leave the temporary server running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run_and_leave()
