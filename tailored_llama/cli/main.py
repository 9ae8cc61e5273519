"""The command line `tailored-llama`: the library's stages on plain folders, without the pipeline."""

import sys

import typer

from tailored_llama.cli.answering import answering
from tailored_llama.cli.labelling import labelling
from tailored_llama.cli.making import making
from tailored_llama.cli.measuring import measuring
from tailored_llama.cli.running import running
from tailored_llama.cli.store import store_app
from tailored_llama.console import quiet_libraries
from tailored_llama.errors import InputError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Prune a LLaMA-family model, tailor it to one benchmark, and measure the result.",
    epilog="Settings: `tailored-llama fields`, and docs/how-to/choose.md for which. "
    "From Python: `import tailored_llama as tl`. As flows: `python -m flows`; every night: docs/how-to/nights.md. "
    "Figures: `make docs`, Results.",
)
app.add_typer(running)
app.add_typer(making)
app.add_typer(measuring)
app.add_typer(answering)
app.add_typer(labelling)
app.add_typer(store_app, name="store")


def main() -> None:
    """Entry point: an InputError becomes one line and exit status 2."""
    quiet_libraries()
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
