"""kill -9 in the middle of a stage: the next run finishes, and computes nothing that was published."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import as_toml

ROOT = Path(__file__).parents[2]
Start = Callable[[dict[str, Any]], subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Run the flow in a process of its own, on a temporary Prefect server of its own; output goes to run.log."""
    runs: list[subprocess.Popen[bytes]] = []

    def run(configuration: dict[str, Any]) -> subprocess.Popen[bytes]:
        (tmp_path / "run.toml").write_text(as_toml(configuration))
        command = [sys.executable, "-m", "flows", "tailor", str(tmp_path / "run.toml")]
        environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "DO_NOT_TRACK": "1"}
        with (tmp_path / "run.log").open("w") as log:
            runs.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
            )
        return runs[-1]

    yield run
    for process in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a killed run's server outlives it
        process.wait()


def manifests(store: Path) -> dict[Path, tuple[float, str]]:
    """Each artifact's place → when its manifest was written, and the digests of its files."""
    return {
        path.parent.relative_to(store): (path.stat().st_mtime, json.dumps(json.loads(path.read_text())["files"]))
        for path in store.glob("*/*/manifest.json")
    }


def test_a_terminated_run_takes_its_temporary_server_along(
    own_run: dict[str, Any], tmp_path: Path, start: Start
) -> None:
    own_run["tuning"] |= {"epochs": 1000, "held_out": 0}
    own_run["execution"] = {"keep_state_every": 1}
    run = start(own_run)
    deadline = time.monotonic() + 120
    while not list(Path(own_run["store"]["root"]).glob(".resume/*/state.safetensors")):  # within the flow
        assert run.poll() is None, (tmp_path / "run.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.terminate()
    assert run.wait(30) == 128 + signal.SIGTERM, (tmp_path / "run.log").read_text()
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        os.killpg(run.pid, 0)


def test_a_run_killed_in_mid_tuning_is_finished_by_the_next(
    own_run: dict[str, Any], tmp_path: Path, start: Start
) -> None:
    own_run["tuning"] |= {"epochs": 150, "held_out": 0}
    own_run["execution"] = {"keep_state_every": 10}
    store = Path(own_run["store"]["root"])
    run = start(own_run)
    deadline = time.monotonic() + 120
    while not any(path.is_dir() for path in store.glob(".building/*")) or not list(store.glob("pruned/*")):
        assert run.poll() is None, (tmp_path / "run.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while not (store / "scores").is_dir() or len(list(store.glob("scores/*"))) < 2:
        assert run.poll() is None
        time.sleep(0.01)
    while not list(store.glob(".resume/*/state.safetensors")):  # tuning's, the only stage that is left
        assert run.poll() is None
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    before = manifests(store)
    assert not {place.parts[0] for place in before} & {"adapter", "report"}
    assert list(store.glob(".building/*"))

    assert start(own_run).wait(timeout=120) == 0, (tmp_path / "run.log").read_text()
    assert "going on after step" in (tmp_path / "run.log").read_text()
    after = manifests(store)
    assert {place: after[place] for place in before} == before
    assert not list(store.glob(".building/*"))
    assert not list(store.glob(".resume/*"))
    assert {place.parts[0] for place in after.keys() - before.keys()} == {"adapter", "scores", "report"}

    own_run["store"]["root"] = str(tmp_path / "undisturbed")
    assert start(own_run).wait(timeout=120) == 0
    undisturbed = manifests(tmp_path / "undisturbed")
    for place, (_, files) in undisturbed.items():
        if place.parts[0] != "report":  # its page says what each stage took
            assert after[place][1] == files, place
