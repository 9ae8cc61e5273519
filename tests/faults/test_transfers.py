"""Killed in the middle of a download, or of a push to the URL of a store."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from faults.index import index_of
from faults.runs import BOUND, Moment, Runner, Undisturbed, artifacts, check_nothing_lost
from services import children_of, kill

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("stage", "victim", "share"),
    [("dense", "flow", 0.3), ("dense", "flow and pip", 0.9), ("dense", "pip", 0.6), ("examples", "flow", 0.5)],
)
def test_a_killed_download(
    stage: str, victim: str, share: float, runner: Runner, undisturbed: Undisturbed, store: Path, tmp_path: Path,
    trial: Any, pytestconfig: pytest.Config,
) -> None:  # fmt: skip
    if pytestconfig.getoption("tiny"):
        pytest.skip("the tiny model and its data are no wheels")
    undisturbed.copy_before(None, store)
    shutil.rmtree(store / undisturbed.first_of(stage))
    before, downloads = artifacts(store), tmp_path / "downloads"
    wheels = Path(runner.configuration["store"]["downloads"])
    entered = trial(f"kill -9 of {victim} in mid-download", f"{stage}, {share:.0%}")
    with index_of(wheels) as index, entered:
        options: Any = {"changed": index.environment, "downloads": str(downloads)}
        index.share = share
        run = runner.start(store, **options)
        assert index.stopped.wait(120), runner.log
        index.share = 1.0
        if victim == "flow":
            os.kill(run.pid, signal.SIGKILL)
        elif victim == "pip":
            (pip,) = children_of(run.pid, "pip")
            os.kill(pip, signal.SIGKILL)
            if run.wait(BOUND) != 0:
                assert "pip cannot download it" in runner.log
        else:
            kill(run)
        run.wait(BOUND)
        assert artifacts(store).items() >= before.items()
        runner.finish_elsewhere(store, **options)
        check_nothing_lost(store, before, undisturbed)
        assert not [path for path in downloads.iterdir() if path.suffix != ".whl" and path.name != ".lock"]
    shutil.rmtree(downloads)


def test_a_killed_push(runner: Runner, undisturbed: Undisturbed, store: Path, tmp_path: Path, trial: Any) -> None:
    """A store at a URL: this one is a folder, but pushed to file by file as to S3."""
    place = undisturbed.first_of("adapter")
    before = artifacts(undisturbed.copy_before(place, store))
    url = f"file://{store}"

    def at(home: str) -> Any:
        (tmp_path / home).mkdir(exist_ok=True)
        return {"changed": {"HOME": str(tmp_path / home)}}  # the working copy is below it

    with trial("kill -9 of the flow in mid-push", "adapter, next on another machine") as made:
        run = runner.start(url, Moment(place, "pushes", 1), **at("first"))
        assert run.wait(BOUND) == -signal.SIGKILL, runner.log
        assert artifacts(store) == before
        assert (store / place).is_dir()
        made.seconds_lost = undisturbed.seconds(place)
        runner.finish_elsewhere(url, **at("second"))
        check_nothing_lost(store, before, undisturbed)
    for home in ("first", "second"):
        shutil.rmtree(tmp_path / home, ignore_errors=True)
