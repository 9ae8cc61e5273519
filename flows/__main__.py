"""Run a flow from a configuration file: python -m flows NAME CONFIG.toml [--set KEY=VALUE …]."""

import atexit
import os
import signal
import sys
from threading import Timer
from typing import Annotated, Any

import typer

from tailored_llama.pipeline import COMPOSITIONS, Composition, WaitingForLabels, run_composition
from tailored_llama.store import ArtifactRef

Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one field")]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Run a flow from a configuration file.")
LAST_WORDS = 60.0  # seconds that Prefect has, after a run, to send its events to the server


def _add_command(name: str, composition: Composition) -> None:
    def run(
        config: Annotated[str, typer.Argument(metavar="CONFIG", help=f"a TOML file such as {composition.example}")],
        overrides: Overrides = None,
        only: Annotated[str | None, typer.Option(metavar="STAGE", help="run one alone: 'tune arc_easy @ 0.20'")] = None,
    ) -> None:
        def execute(_: Composition, loaded: Any) -> ArtifactRef:
            from flows.compositions import FLOWS, WAITING  # with Prefect: a second that a wrong value needs not

            state: Any = FLOWS[name](loaded, only, return_state=True)
            if state.name == WAITING:
                raise WaitingForLabels(str(state.message))
            reference: ArtifactRef = state.result()
            return reference

        raise typer.Exit(run_composition(name, config, overrides or [], execute))

    app.command(name, help=composition.about)(run)


for _name, _composition in COMPOSITIONS.items():
    _add_command(_name, _composition)


def run_and_leave() -> None:
    """Run a flow, and end the process with its status at most `LAST_WORDS` later.

    Prefect keeps the process alive until every event of the run is sent, and tries each for two minutes: a server that
    hangs would hold up a finished run for hours. Exit handlers run in reverse order, so that ours comes after
    Prefect's. It skips Python's taking the libraries apart, which is seconds.
    """
    status = 1
    atexit.register(lambda: _leave(status))
    try:
        app()
    except SystemExit as end:  # of Typer: 0, 1 if stages failed, 2 for bad input; or after a SIGTERM
        status = end.code if isinstance(end.code, int) else 1
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
