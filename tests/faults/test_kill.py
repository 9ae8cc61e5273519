"""kill -9 of the flow at seeded moments of every stage: a rerun finishes, and computes nothing that was published."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from faults.runs import BOUND, EXACT, Runner, Undisturbed, artifacts, check_nothing_lost, draw_moments, work_lost

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
        assert (moment.place in before) == (moment.phase == "published") or moment.phase == "works"
        runner.finish(store)
        check_nothing_lost(store, before, undisturbed)
