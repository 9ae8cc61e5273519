"""Stages on two workers: one is killed, its stage goes to the other; a run is cancelled."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from services import children_of, kill, until
from sites import ENDED, Site

pytestmark = pytest.mark.deployed


def stage_runs(site: Site, since: str) -> list[dict[str, Any]]:
    """The runs of stage/gpu that were made after a time, in that order."""
    asked = {
        "deployments": {"name": {"any_": ["gpu"]}},
        "flow_runs": {"expected_start_time": {"after_": since}},
        "sort": "EXPECTED_START_TIME_ASC",
    }
    found: list[dict[str, Any]] = site.server.call("flow_runs/filter", asked)
    return found


def test_a_killed_worker_s_stage_goes_elsewhere_and_cancelling_ends_all_of_it(
    site: Site, own_run: dict[str, Any], tailor_here: Callable[[dict[str, Any]], None]
) -> None:
    others = [{**own_run["benchmarks"][0], "name": name} for name in ("shades", "tints")]
    own_run |= {"benchmarks": [*own_run["benchmarks"], *others], "execution": {"device": "cpu"}}
    own_run["tuning"] |= {"shots": 20}
    tailor_here(own_run | {"tuning": own_run["tuning"] | {"examples": "none"}})  # all but the adapters

    long = own_run["tuning"] | {"epochs": 1000, "patience": 1000, "batch_size": 1}  # minutes
    own_run |= {"tuning": long, "execution": {"device": "cpu", "dispatch": "gpu"}}
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    run = site.run("tailor/on-demand", {"config": own_run})

    def stages(*states: str) -> list[dict[str, Any]]:
        return [one for one in stage_runs(site, begun) if one["state"]["type"] in states]

    until(lambda: len(stages("RUNNING")) == 2, 180, "two stages at once", 0.5)
    (waiting,) = until(lambda: stages("SCHEDULED", "PENDING"), 60, "the third stage", 0.5)
    victim = site.gpu_workers.pop()
    (process,) = until(lambda: children_of(victim.pid), 10, "its run's process")
    lost = next(one for one in stages("RUNNING") if one["infrastructure_pid"] == str(process))
    kill(victim)
    site.start_gpu_worker()
    crashed = {"type": "CRASHED", "message": "no heartbeat"}  # what an automation says after 90 seconds
    site.server.call(f"flow_runs/{lost['id']}/set_state", {"state": crashed, "force": True})

    def again() -> list[dict[str, Any]]:
        return [one for one in stages("SCHEDULED", "PENDING", "RUNNING") if one["name"] == lost["name"]]

    (second,) = until(again, 120, "the killed worker's stage, asked for again", 0.5)
    until(lambda: waiting["id"] in [one["id"] for one in stages("RUNNING")], 120, "the new worker's stage", 0.5)
    assert second["id"] != lost["id"]

    site.server.call(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert site.ended(run)["state"]["type"] == "CANCELLED"
    until(lambda: len(stages(*ENDED)) == 4, 120, "the end of all stages", 0.5)
    time.sleep(5)
    ended = stage_runs(site, begun)
    assert sorted(one["state"]["type"] for one in ended) == ["CANCELLED"] * 3 + ["CRASHED"]
    assert not any(children_of(worker.pid) for worker in site.gpu_workers)
