"""Folders that commands read and write: outputs appear whole or not at all, and stages run on folders.

torch and transformers take seconds to load. What needs them is imported in the commands, after their arguments were
checked, so that --help and a bad value answer at once.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tailored_llama.config import RunConfig, validate_config
from tailored_llama.data import check_benchmark
from tailored_llama.errors import InputError
from tailored_llama.pipeline import FolderExecutor
from tailored_llama.store import NO_ROOM, error_number


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name only after everything in it is written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; allowed: a new or empty folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; allowed: a path in a writable folder") from None
    with room_for(out), scratch:
        folder = Path(scratch.name) / "new"
        folder.mkdir()
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)


@contextmanager
def room_for(out: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an InputError."""
    try:
        yield
    except Exception as error:
        if (number := error_number(error)) not in NO_ROOM:
            raise
        raise InputError(f"{out}: {os.strerror(number)}; allowed: a writable folder with room") from error


def check_new_file(file: Path) -> None:
    """Refuse a file that exists, or whose folder does not."""
    if file.exists() or not file.parent.is_dir():
        raise InputError(f"{file}: {'exists' if file.exists() else 'its folder is missing'}; allowed: a new file")


@contextmanager
def scratch_runner(config: RunConfig) -> Iterator[FolderExecutor]:
    """An executor whose folders are gone at the end of the block."""
    with tempfile.TemporaryDirectory() as scratch:
        yield FolderExecutor(Path(scratch), config.store.downloads, config.execution)


def with_benchmarks(config: RunConfig, names: Sequence[str], checkpoint: Path | None = None) -> RunConfig:
    """The same run with the named benchmarks alone, configured or built in, of a checkpoint whose template may ask."""
    configured = {benchmark.name: benchmark for benchmark in config.benchmarks}
    others = {name: validate_config({"benchmarks": [name]}).benchmarks[0] for name in names if name not in configured}
    chosen = tuple((configured | others)[name] for name in names)
    for benchmark in chosen:
        check_benchmark(benchmark)
    of_checkpoint = {"source": str(checkpoint), "revision": None} if checkpoint else {}
    return config.model_copy(update={"benchmarks": chosen, "model": config.model.model_copy(update=of_checkpoint)})
