"""What a server records of a run: a task run for each stage, how it ended, and which stages it reads."""

from collections.abc import Callable
from typing import Any

import pytest

from services import until
from sites import Site
from tailored_llama import evaluation
from tailored_llama.pipeline import IncompleteRun

pytestmark = pytest.mark.deployed


def recorded(site: Site, count: int) -> dict[str, dict[str, Any]]:
    """The task runs of the newest flow run that no deployment made, once `count` of them have ended."""
    asked = {"flow_runs": {"deployment_id": {"is_null_": True}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
    (run,) = site.server.call("flow_runs/filter", asked)

    def ended() -> dict[str, dict[str, Any]] | None:
        found = site.task_runs(run["id"])
        done = [one for one in found.values() if one["state_type"] in ("COMPLETED", "FAILED")]
        return found if len(done) == len(found) >= count else None

    found: dict[str, dict[str, Any]] = until(ended, 60, f"{count} task runs, all ended")
    assert len(found) == count
    return found


def test_a_stage_is_a_task_run_that_shows_what_it_reads_and_the_second_time_is_cached(
    site: Site, own_run: dict[str, Any], tailor_here: Callable[[dict[str, Any]], None]
) -> None:
    tailor_here(own_run)
    runs = recorded(site, 18)
    assert {run["state_name"] for run in runs.values()} == {"Completed"}
    names = {run["id"]: name for name, run in runs.items()}
    reads = {
        name: {names[one["id"]] for ones in run["task_inputs"].values() for one in ones if "id" in one}
        for name, run in runs.items()
    }
    text = f"load calibration {own_run['calibration']['source']}"
    assert reads["prune @ 0.20"] >= {"build graph", "importance taylor_gate", text}
    assert "tune colours @ 0.20" in reads["score colours tailored @ 0.20"]
    assert len(reads["report"]) > 5

    tailor_here(own_run)
    assert {run["state_name"] for run in recorded(site, 18).values()} == {"Cached"}


def test_a_stage_that_fails_is_a_failed_task_run(
    site: Site, own_run: dict[str, Any], tailor_here: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(evaluation, "measure_perplexity", out_of_memory)
    with pytest.raises(IncompleteRun, match="CUDA out of memory"):
        tailor_here(own_run)
    failed = {name for name, run in recorded(site, 18).items() if run["state_name"] == "Failed"}
    assert failed == {"perplexity dense", "perplexity pruned @ 0.20"}
