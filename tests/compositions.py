"""Compositions that run in this process, and what they leave in their store."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tailored_llama.cli.main import app
from tailored_llama.evaluation import SweepRow
from tailored_llama.pipeline import COMPOSITIONS, IncompleteRun, StoreExecutor
from tailored_llama.store import ArtifactStore, read_rows


def compose(name: str, config: Any) -> Path:
    """Run a composition; returns the folder of its report, whose name is the key."""
    run = StoreExecutor(config.store, config.execution)
    return run.folder(COMPOSITIONS[name].make(run, config))


def compose_incomplete(name: str, config: Any) -> tuple[Path, Mapping[str, Exception]]:
    """Run a composition of which stages fail; returns the folder of the report of what there is, and the failures."""
    with pytest.raises(IncompleteRun) as ended:
        compose(name, config)
    assert ended.value.report
    return ArtifactStore(config.store.root).open(ended.value.report), ended.value.failed


def read_sweep(report: Path) -> list[SweepRow]:
    """The rows of a sweep's report, dense models first."""
    return read_rows(report / "sweep.parquet", SweepRow)


def run_command(*arguments: Any) -> tuple[int, str, str]:
    """`tailored-llama run`: its exit status, stdout and stderr."""
    ended = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["run", *map(str, arguments)])
    if ended.exception and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return ended.exit_code, ended.stdout, ended.stderr


def status_of(app: Any, arguments: list[str]) -> Any:
    """The exit status of a command of Typer's that works in this process."""
    with pytest.raises(SystemExit) as ended:
        app(arguments)
    return ended.value.code


def built(root: str) -> dict[Path, float]:
    """Every artifact of a store, and when it was published."""
    return {path.parent: path.stat().st_mtime for path in Path(root).glob("[!.]*/*/manifest.json")}


def kinds(root: str, before: Mapping[Path, float] | None = None) -> list[str]:
    """The kinds of the artifacts that a store has got since `before`, of which all are as they were."""
    before, after = before or {}, built(root)
    assert {path: after.get(path) for path in before} == before
    return sorted(path.parent.name for path in after.keys() - before.keys())


def folders(root: str, kind: str) -> list[Path]:
    """The artifacts of a kind."""
    return sorted(path for path in built(root) if path.parent.name == kind)


def fail(
    patch: pytest.MonkeyPatch,
    function: tuple[Any, str],
    error: Exception,
    when: Callable[[Mapping[str, Any]], bool] = lambda call: True,
) -> None:
    """Let a stage's function, given as its room and its name, fail: always, or on calls with certain arguments."""
    real = getattr(*function)

    def stage(**call: Any) -> Any:
        if when(call):
            raise error
        return real(**call)

    patch.setattr(*function, stage)
