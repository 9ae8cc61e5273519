"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from tailored_llama.errors import InputError


def checkpoint_folder(path: Path | None) -> Path | None:
    """Refuse a folder that is no checkpoint, before torch is imported."""
    if path is not None and not (path / "config.json").is_file():
        raise InputError(f"{path / 'config.json'}: missing; allowed: a checkpoint folder")
    return path


Config = Annotated[Path | None, typer.Option("--config", help="Run configuration (TOML); absent: the defaults.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one field (see `fields`).")
]
Model = Annotated[str, typer.Argument(help="Model source: embedded name, folder, .gguf file or Hub id.")]
Out = Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")]
Checkpoint = Annotated[Path, typer.Argument(help="Checkpoint folder.", callback=checkpoint_folder)]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="Folder of an adapter trained on this checkpoint.")]
BenchmarkName = Annotated[str, typer.Option("--benchmark", "-b", help="Name of a benchmark, or your own file of rows.")]
