"""The worker is killed, the server is killed, answers 500 or hangs: the run ends, and a rerun finishes it."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faults.proxy import proxy_to
from faults.runs import BOUND, Runner, Undisturbed, artifacts, check_nothing_lost, work_lost
from services import Server, Spawn, deploy, kill, start_worker, until

pytestmark = pytest.mark.faults
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@pytest.mark.parametrize("victim", ["worker", "worker and run"])
def test_a_killed_worker(
    victim: str,
    runner: Runner,
    undisturbed: Undisturbed,
    store: Path,
    spawn: Spawn,
    shared_server: Server,
    tmp_path: Path,
    trial: Any,
) -> None:
    place = undisturbed.first_of("adapter")
    undisturbed.copy_before(place, store)
    pool = victim.replace(" ", "-")
    deployment = deploy(shared_server, pool)
    with trial(f"kill -9 of the {victim}", "adapter") as made:
        worker = start_worker(spawn, shared_server, pool, tmp_path / "run.log")
        parameters = {"config": runner.configuration | {"store": runner.configuration["store"] | {"root": str(store)}}}
        run = shared_server.call(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]
        begun = runner.wait_for(worker, store, place, 0.3, undisturbed.seconds(place))

        def state() -> dict[str, Any]:
            found: dict[str, Any] = shared_server.call(f"flow_runs/{run}")["state"]
            return found

        if victim == "worker":  # its run goes on, until it writes to its output, which the worker passed on
            os.kill(worker.pid, signal.SIGKILL)
            until(lambda: state()["type"] in ENDED, BOUND, "the end of the run", pause=0.5)
        else:
            kill(worker)
        made.seconds_lost, before = work_lost(store, place, begun), artifacts(store)
        if state()["type"] != "COMPLETED":
            again = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}  # the UI's Retry
            shared_server.call(f"flow_runs/{run}/set_state", again)
            start_worker(spawn, shared_server, pool, tmp_path / "run.log")
            until(lambda: state()["type"] in ENDED, BOUND, "the end of the run's retry", pause=0.5)
        assert state()["type"] == "COMPLETED", runner.log
        check_nothing_lost(store, before, undisturbed)


@pytest.mark.parametrize("stage", ["pruned", "adapter"])
def test_a_killed_server_is_started_again(
    stage: str, runner: Runner, undisturbed: Undisturbed, store: Path, spawn: Spawn, tmp_path: Path, trial: Any
) -> None:
    server = Server(spawn, tmp_path / "prefect")
    server.start()
    own, place = replace(runner, server=server), undisturbed.first_of(stage)
    undisturbed.copy_before(place, store)
    with trial("kill -9 of the server, then a restart", stage) as made:
        run = own.start(store)
        begun = own.wait_for(run, store, place, 0.3, undisturbed.seconds(place))
        server.kill()
        before = artifacts(store)
        time.sleep(2)
        server.start()
        if run.wait(BOUND) != 0:
            made.seconds_lost, before = work_lost(store, place, begun), artifacts(store)
            own.finish(store)
        assert server.newest_run()["state_type"] == "COMPLETED"
        check_nothing_lost(store, before, undisturbed)


@pytest.mark.parametrize("mode", ["500", "hang"])
def test_a_server_that_does_not_answer(
    mode: str, runner: Runner, undisturbed: Undisturbed, store: Path, shared_server: Server, trial: Any
) -> None:
    place = undisturbed.first_of("pruned")
    undisturbed.copy_before(place, store)
    impatient = {"PREFECT_API_REQUEST_TIMEOUT": "5", "PREFECT_CLIENT_MAX_RETRIES": "1"}
    fault = "the server answers 500" if mode == "500" else "the server hangs"
    with proxy_to(shared_server.port) as proxy, trial(fault, "pruned") as made:
        run = runner.start(store, url=proxy.url, changed=impatient)
        begun = runner.wait_for(run, store, place, 0.3, undisturbed.seconds(place))
        proxy.mode = mode
        if run.wait(BOUND) != 0:
            made.seconds_lost = work_lost(store, place, begun)
            assert {"500": "500 Internal Server Error", "hang": "timed out"}[mode] in runner.log
        before = artifacts(store)
        proxy.mode = "pass"
        runner.finish(store, url=proxy.url)
        check_nothing_lost(store, before, undisturbed)
