"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailored_llama.cli.folders import checkpoint_folder

Config = Annotated[Path | None, typer.Option("--config", help="Run configuration (TOML); absent: the defaults.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one field (see `fields`).")
]
Out = Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")]
Checkpoint = Annotated[Path, typer.Argument(help="Checkpoint folder.", callback=checkpoint_folder)]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="Folder of an adapter trained on this checkpoint.")]
Dense = Annotated[Path, typer.Option("--dense", help="Dense checkpoint: the teacher.", callback=checkpoint_folder)]
BenchmarkName = Annotated[str, typer.Option("--benchmark", "-b", help="Name of a benchmark, or your own file of rows.")]
