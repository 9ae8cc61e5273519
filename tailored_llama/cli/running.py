"""The commands `run` and `fields`, and running a composition in this process."""

import json
import logging
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler

from tailored_llama.cli.arguments import Overrides
from tailored_llama.config import Section, SmallestConfig, composition_of, is_row_file, load_config, setting
from tailored_llama.console import console
from tailored_llama.errors import InputError
from tailored_llama.pipeline import COMPOSITIONS, Composition, StoreExecutor, plan_run, run_composition
from tailored_llama.store import ArtifactRef

running = typer.Typer()

ConfigFile = Annotated[Path, typer.Argument(help="Configuration (TOML).")]


@running.command(epilog="Example: `tailored-llama run data/quickstart.toml --set tuning.epochs=3`")
def run(
    config: ConfigFile,
    only: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Run one stage alone, such as 'tune arc_easy @ 0.20'.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Run a configuration without Prefect: the pipeline, a sweep or a search. What is in the store is found again."""
    raise typer.Exit(run_in_process(composition_of(config, overrides), str(config), overrides, only))


@running.command(epilog="Example: `tailored-llama plan data/quickstart.toml`")
def plan(
    config: Annotated[Path, typer.Argument(help="Configuration (TOML), or the rows of a search.")],
    overrides: Overrides = None,
) -> None:
    """Print what a run would do, without doing it: what is found in the store, what is to be made, and how long."""
    name, file = "smallest", None
    if is_row_file(str(config)):
        overrides = [setting("benchmarks", [str(config)]), *(overrides or [])]
    else:
        name, file = composition_of(config, overrides), str(config)
    composition = COMPOSITIONS[name]
    loaded = load_config(file, overrides, composition.kind)
    composition.check(loaded)
    print(*composition.announce(loaded), sep="\n")
    print(*plan_run(composition.compose, loaded).lines(), sep="\n")


@running.command(epilog="Example: `tailored-llama fields goal`")
def fields(
    section: Annotated[str | None, typer.Argument(help="Section of a configuration; absent: all of them.")] = None,
) -> None:
    """Print the fields of a configuration with their defaults and meanings."""
    whole = SmallestConfig()
    sections = {name: part for name in SmallestConfig.model_fields if isinstance(part := getattr(whole, name), Section)}
    if section and section not in sections:
        raise InputError(f"section: got {section!r}; allowed: {', '.join(sections)}")
    for name, part in sections.items():
        for field, about in type(part).model_fields.items() if section in (None, name) else ():
            print(f"{name}.{field} = {json.dumps(part.model_dump(mode='json')[field], ensure_ascii=False)}")
            print(textwrap.fill(about.description or "", 100, initial_indent="    ", subsequent_indent="    "))


def run_in_process(name: str, config: str | None, overrides: list[str] | None, only: str | None = None) -> int:
    """Run a composition in this process, with its progress on the terminal; returns the exit status."""

    def make(composition: Composition, loaded: Any) -> ArtifactRef:
        if loaded.execution.dispatch:
            raise InputError(
                f"execution.dispatch: got {loaded.execution.dispatch!r}; allowed: a flow (python -m flows), as this "
                "command works in its own process"
            )
        return composition.make(StoreExecutor(loaded.store, loaded.execution), loaded, only)

    # Logs go through the console that draws the progress bar; lines from elsewhere would break the bar.
    shown = [RichHandler(console=console, show_path=False, show_level=False)] if console.is_terminal else None
    logging.basicConfig(format="%(message)s", handlers=shown)
    logging.getLogger("tailored_llama").setLevel(logging.INFO)
    return run_composition(name, config, overrides or [], make)
