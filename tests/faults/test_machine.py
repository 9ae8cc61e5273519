"""What a machine does: its disk is full or read-only, its clock jumps. One clear error, and a rerun finishes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.runs import BOUND, Runner, Undisturbed, artifacts, check_nothing_lost

pytestmark = pytest.mark.faults
PAGE = 4096
AMPLE = 4 << 30


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    try:
        mount("-t", "tmpfs", "-o", f"size={AMPLE}", "tmpfs", str(folder))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no file system can be mounted here: {error.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def used(folder: Path) -> int:
    """Bytes of a folder's files, in whole pages."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("stage", ["pruned", "adapter"])
def test_a_full_disk(stage: str, runner: Runner, undisturbed: Undisturbed, disk: Path, trial: Any) -> None:
    place, store = undisturbed.first_of(stage), disk / "store"
    before = artifacts(undisturbed.copy_before(place, store, link=False))
    room = used(store) + used(undisturbed.store / place) // 2
    mount("-o", f"remount,size={room}", str(disk))
    with trial("a full disk", stage) as made:
        assert runner.start(store).wait(BOUND) == 2, runner.log
        assert f"error: store.root {store}: No space left on device while publishing {stage}" in runner.log
        assert artifacts(store) == before
        assert not list(store.glob(".building/*"))
        made.seconds_lost = undisturbed.seconds(place)
        mount("-o", f"remount,size={AMPLE}", str(disk))
        runner.finish(store)
        check_nothing_lost(store, before, undisturbed)


def test_a_read_only_store(runner: Runner, undisturbed: Undisturbed, disk: Path, trial: Any) -> None:
    store = disk / "store"
    before = artifacts(undisturbed.copy_before(undisturbed.first_of("adapter"), store, link=False))
    mount("-o", "remount,ro", str(disk))
    with trial("a read-only store", "adapter"):
        assert runner.start(store).wait(BOUND) == 2, runner.log
        assert f"error: store.root: got '{store}', Read-only file system" in runner.log
        mount("-o", "remount,rw", str(disk))
        runner.finish(store)
        check_nothing_lost(store, before, undisturbed)


def test_a_clock_that_jumps(runner: Runner, undisturbed: Undisturbed, store: Path, tmp_path: Path, trial: Any) -> None:
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler to make a clock that jumps")
    clock = tmp_path / "jumping_clock.so"
    source = Path(__file__).with_name("jumping_clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(clock), str(source), "-ldl"], check=True)
    preloaded = {"LD_PRELOAD": str(clock)}
    told = "import time; a = time.time(); time.sleep(2.1); print(abs(time.time() - a))"
    jump = subprocess.run([sys.executable, "-c", told], env={**os.environ, **preloaded}, capture_output=True, text=True)
    assert float(jump.stdout) > 1000
    before = artifacts(undisturbed.copy_before(undisturbed.first_of("importance"), store))
    with trial("a clock that jumps", "all from importance on"):
        runner.finish_elsewhere(store, changed=preloaded)
        check_nothing_lost(store, before, undisturbed)
