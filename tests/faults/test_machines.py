"""Two machines that run the same flow at once on one store: each stage is computed by one, also if the other dies."""

import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.runs import BOUND, Runner, Undisturbed, artifacts, check_nothing_lost
from services import Server, Spawn, until
from tailored_llama.store import ArtifactStore

pytestmark = pytest.mark.faults


class Machine:
    """A home folder with a working copy of a store behind a URL, and a runner."""

    def __init__(self, home: Path, url: str, configuration: dict[str, Any], spawn: Spawn, server: Server) -> None:
        home.mkdir()
        self.url, self.home, self.runner = url, home, Runner(configuration, home, spawn, server)
        self.local = ArtifactStore(url, str(home / ".cache" / "tailored-llama" / "artifacts")).local

    def start(self) -> Any:
        return self.runner.start(self.url, changed={"HOME": str(self.home)})


@pytest.fixture
def machines(
    configuration: dict[str, Any], store: Path, tmp_path: Path, spawn: Spawn, shared_server: Server
) -> Iterator[tuple[Machine, Machine]]:
    """Two, and a store that is a folder, but pushed to and pulled from file by file as S3 is."""
    one, two = (
        Machine(tmp_path / name, f"file://{store}", configuration, spawn, shared_server) for name in ("one", "two")
    )
    yield one, two
    for machine in (one, two):
        shutil.rmtree(machine.home)


def computed(*machines: Machine) -> Counter[str]:
    """How often each artifact was computed to its end."""
    return Counter(
        f"{stage} {key}"
        for machine in machines
        for stage, key in re.findall(r"([\w-]+) ([0-9a-f]{12}), [0-9.]+ s, peak memory", machine.runner.log)
    )


def test_two_flows_at_once_compute_each_stage_once(
    machines: tuple[Machine, Machine], undisturbed: Undisturbed, store: Path, trial: Any
) -> None:
    with trial("two flows at once", "two machines, one store"):
        runs = [machine.start() for machine in machines]
        for machine, run in zip(machines, runs, strict=True):
            assert run.wait(BOUND) == 0, machine.runner.log
        check_nothing_lost(store, {}, undisturbed)
    assert set(computed(*machines).values()) == {1}
    assert len(computed(*machines)) == len(undisturbed.places)


@pytest.mark.short
def test_a_machine_takes_over_from_one_that_is_killed(
    machines: tuple[Machine, Machine], undisturbed: Undisturbed, store: Path, trial: Any
) -> None:
    place = undisturbed.first_of("adapter")
    one, two = machines
    undisturbed.copy_before(place, store, link=False)
    with trial("kill -9 of one of two machines", "adapter, in mid-stage") as made:
        first = one.start()
        one.runner.wait_for(first, one.local, place, 0.3, undisturbed.seconds(place))
        os.kill(first.pid, signal.SIGSTOP)  # until the other has started, which takes longer than a small stage
        second = two.start()
        until(lambda: "has it in hand" in two.runner.log, BOUND, "the second machine waits")
        os.kill(first.pid, signal.SIGKILL)
        made.seconds_lost, before = undisturbed.seconds(place), artifacts(store)
        assert second.wait(BOUND) == 0, two.runner.log
        check_nothing_lost(store, before, undisturbed)
    assert "stopped renewing its claim" in two.runner.log
    assert set(computed(*machines).values()) == {1}
