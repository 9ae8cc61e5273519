"""The record of how often proving rows were opened: no plan gets a number that another has, and nothing removes it."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from s3 import S3Server
from tailored_llama.store import ArtifactStore, leftovers, record_opening, removable, remove_artifacts, survey, verify

FORK = multiprocessing.get_context("fork")
PROCESSES = 6


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = tmp_path.name.replace("_", "-").replace("[", "-").replace("]", "")
    if request.param in ("folder", "file"):
        return f"{'file://' * (request.param == 'file')}{tmp_path / 'store'}"
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        s3.new_bucket(name)
    return f"{request.param}://{name}/store"


@pytest.fixture
def store(root: str, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(root, str(tmp_path / "working-copy"))


def number(store: ArtifactStore, plan: str, goal: str = "goal") -> int:
    return record_opening(store, goal, plan)[0]


def test_a_plan_opens_once_and_every_other_plan_is_counted(store: ArtifactStore) -> None:
    assert [number(store, plan) for plan in ("one", "one", "two", "one", "three", "two")] == [1, 1, 2, 1, 3, 2]
    assert number(store, "two", "another goal") == 1


def test_another_machine_reads_the_same_record(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on(machine: str, plan: str) -> int:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / f"state of {machine}"))
        return number(ArtifactStore(root, str(tmp_path / machine)), plan)

    assert [on("here", "one"), on("there", "two"), on("there", "one"), on("here", "two")] == [1, 2, 1, 2]


def test_rows_stay_opened_in_every_store(store: ArtifactStore, tmp_path: Path) -> None:
    other = ArtifactStore(str(tmp_path / "another store"))
    assert record_opening(store, "goal", "one") == (1, "the store and the user's state folder")
    assert [number(other, plan) for plan in ("two", "one", "three")] == [2, 1, 3]
    assert [number(store, plan) for plan in ("three", "four")] == [3, 4]


def test_plans_that_only_the_store_has_recorded_keep_their_numbers(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with monkeypatch.context() as unwritable:
        unwritable.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
        assert [record_opening(store, "goal", plan) for plan in ("one", "two")] == [(1, "the store"), (2, "the store")]
        unwritable.delenv("XDG_STATE_HOME")
        unwritable.setattr("os.path.expanduser", lambda path: path)  # a user without a home folder
        assert record_opening(store, "goal", "two") == (2, "the store")
    assert "is recorded in the store alone: [Errno 20] Not a directory" in caplog.text
    assert "is recorded in the store alone: could not determine the home directory" in caplog.text
    assert [number(store, plan) for plan in ("two", "three", "one")] == [2, 3, 1]


def _open(root: str, copy: str, plan: str, start: Any, results: Any) -> None:
    store = ArtifactStore(root, copy)
    start.wait(30)
    results.put((plan, number(store, plan)))


@pytest.mark.parametrize("root", ["folder", "file", "s3"], indirect=True)  # memory:// is one process's own
def test_plans_that_open_at_once_get_numbers_of_their_own(root: str, tmp_path: Path) -> None:
    start, results = FORK.Barrier(PROCESSES), FORK.Queue()
    plans = [f"plan {number // 2}" for number in range(PROCESSES)]  # each of three plans twice
    processes = [
        FORK.Process(target=_open, args=(root, str(tmp_path / str(number)), plan, start, results))
        for number, plan in enumerate(plans)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
    assert len(set(found)) == 3  # both processes of a plan got one number
    assert sorted({number for _, number in found}) == [1, 2, 3]


def test_housekeeping_neither_lists_nor_removes_the_record(store: ArtifactStore) -> None:
    ref, _ = store.build("stage", 1, {}, {}, lambda out: (out / "text.txt").write_text("text") and None)
    assert [number(store, plan) for plan in ("one", "two")] == [1, 2]
    in_a_year = time.time() + 365 * 86400
    assert [name for name, _ in leftovers(store, now=in_a_year) if ".openings" in name] == []
    entries = survey(store)
    assert [entry.name for entry in entries] == [("stage", ref.key)]
    assert [problem for _, problem in verify(store)] == [None]
    assert remove_artifacts(store, removable(entries, older_than=0, now=in_a_year)) == entries
    assert [number(store, plan) for plan in ("one", "three", "two")] == [1, 3, 2]


def test_rows_are_opened_once_where_files_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)  # as on exFAT and many network shares
    store = ArtifactStore(str(tmp_path / "store"))
    assert [number(store, plan) for plan in ("one", "one", "two", "one")] == [1, 1, 2, 1]
