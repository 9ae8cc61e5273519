"""SIGTERM stops a run in mid-stage, in every long stage; a stage is computed once for two runs."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faults.runs import BOUND, Runner, Undisturbed, artifacts, check_nothing_lost, work_lost
from helpers import as_toml
from services import ROOT, SETTINGS, Server, until
from tailored_llama.training.state import FILE

pytestmark = pytest.mark.faults
LONG = ["dense", "importance", "pruned", "perplexity", "scores", pytest.param("adapter", marks=pytest.mark.short)]


@pytest.mark.parametrize("stage", LONG)
def test_sigterm(
    stage: str, runner: Runner, undisturbed: Undisturbed, store: Path, shared_server: Server, trial: Any
) -> None:
    place = undisturbed.first_of(stage)
    undisturbed.copy_before(place, store)
    with trial("SIGTERM", stage) as made:
        run = runner.start(store)
        # Early: this run may be faster than the undisturbed one, and a run that has finished exits with 0.
        begun = runner.wait_for(run, store, place, 0.2, undisturbed.seconds(place))
        os.kill(run.pid, signal.SIGTERM)
        assert run.wait(30) != 0, runner.log  # a second or so; more beside other work
        made.seconds_lost, before = work_lost(store, place, begun), artifacts(store)
        assert not list(store.glob(".building/*"))
        assert shared_server.newest_run()["state_type"] in ("CRASHED", "CANCELLED")
        runner.finish(store)
        check_nothing_lost(store, before, undisturbed)


@pytest.mark.short
def test_two_runs_at_once_compute_each_stage_once(
    runner: Runner, undisturbed: Undisturbed, store: Path, tmp_path: Path, trial: Any
) -> None:
    (tmp_path / "other").mkdir()
    other = replace(runner, folder=tmp_path / "other")
    with trial("two runs at once", "all stages"):
        runs = [runner.start(store), other.start(store)]
        assert [run.wait(BOUND) for run in runs] == [0, 0], runner.log + other.log
        check_nothing_lost(store, {}, undisturbed)
        for place in artifacts(store):
            stage, key = place.split("/")
            made = rf"{stage} {key[:12]}, [\d.]+ s, peak memory"
            assert len(re.findall(made, runner.log + other.log)) == 1, (place, runner.log, other.log)


@pytest.mark.short
def test_a_terminated_run_takes_its_temporary_server_along(
    configuration: dict[str, Any], store: Path, tmp_path: Path, trial: Any
) -> None:
    """Without a server, a run starts one of its own."""
    endless = configuration | {"tuning": configuration["tuning"] | {"epochs": 1000, "patience": 1000}}
    endless["store"] = configuration["store"] | {"root": str(store), "reports": str(tmp_path / "reports")}
    (tmp_path / "run.toml").write_text(as_toml(endless))
    environment = {**os.environ, **SETTINGS, "PREFECT_HOME": str(tmp_path / "prefect")}
    command = [sys.executable, "-m", "flows", "tailor", str(tmp_path / "run.toml")]
    with trial("SIGTERM", "its own server"), (tmp_path / "run.log").open("w") as log:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            until(
                lambda: run.poll() is not None or list(store.glob(f".resume/*/{FILE}")), BOUND, "tuning's first state"
            )
            assert run.poll() is None, (tmp_path / "run.log").read_text()
            run.terminate()
            assert run.wait(30) == 128 + signal.SIGTERM, (tmp_path / "run.log").read_text()
            with pytest.raises(ProcessLookupError):  # nobody of its group is left
                os.killpg(run.pid, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)  # a killed run's server outlives it
            run.wait()
