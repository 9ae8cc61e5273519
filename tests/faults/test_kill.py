"""kill -9 of the flow at seeded moments of every stage: a rerun finishes, and computes nothing that was published."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from faults.runs import BOUND, EXACT, Runner, Undisturbed, artifacts, check_nothing_lost, draw_moments, work_lost
from services import until
from tailored_llama.training.state import FILE

pytestmark = pytest.mark.faults


@pytest.mark.short
def test_a_killed_run_is_finished_by_the_next(
    kill_number: int, runner: Runner, undisturbed: Undisturbed, store: Path, trial: Any, pytestconfig: pytest.Config
) -> None:
    moment = draw_moments(undisturbed.places, pytestconfig.getoption("kills"))[kill_number]
    undisturbed.copy_before(moment.place, store)
    with trial("kill -9 of the flow", str(moment)) as made:
        exact = moment.phase in EXACT
        run = runner.start(store, moment if exact else None)
        share = moment.share if moment.phase == "works" else 0.0
        begun = runner.wait_for(run, store, moment.place, share, undisturbed.seconds(moment.place))
        if not exact:
            os.kill(run.pid, signal.SIGKILL)
        assert run.wait(BOUND) == -signal.SIGKILL, runner.log
        made.seconds_lost = work_lost(store, moment.place, begun)
        before = artifacts(store)
        assert not exact or (moment.place in before) == (moment.phase == "published")
        runner.finish(store)
        check_nothing_lost(store, before, undisturbed)


@pytest.mark.short
def test_a_killed_tuning_goes_on_and_ends_with_the_same_weights(
    runner: Runner, undisturbed: Undisturbed, store: Path, trial: Any, caplog: pytest.LogCaptureFixture
) -> None:
    place = undisturbed.first_of("adapter")
    undisturbed.copy_before(place, store)
    with trial("kill -9 of the flow in mid-tuning", "adapter, some steps done") as made:
        run = runner.start(store)
        begun = runner.wait_for(run, store, place, 0.0, 0.0)
        state = store / ".resume" / place.split("/")[1] / FILE
        until(state.exists, BOUND, "a first state of the training", pause=0.001)
        os.kill(run.pid, signal.SIGKILL)
        run.wait(BOUND)
        made.seconds_lost, before = work_lost(store, place, begun), artifacts(store)
        assert place not in before
        runner.finish(store)
        assert "going on after step" in caplog.text
        check_nothing_lost(store, before, undisturbed)
