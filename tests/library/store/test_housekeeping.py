"""The store's housekeeping: what a kept report used never goes, and a store is whole after every step."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s3 import S3Server
from tailored_llama.errors import InputError
from tailored_llama.store import (
    MANIFEST,
    ArtifactRef,
    ArtifactStore,
    Entry,
    Manifest,
    file_lock,
    leftovers,
    removable,
    remove_artifact,
    remove_artifacts,
    remove_leftover,
    reports_using,
    survey,
    verify,
)

FORK = multiprocessing.get_context("fork")
DAY = 86400.0
Make = Callable[..., ArtifactRef]


def text_of(size: int) -> Callable[[Path], None]:
    return lambda out: (out / "text.txt").write_text("x" * size) and None


@pytest.fixture(params=["folder", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store's root: a folder, or a URL."""
    if request.param == "folder":
        return str(tmp_path / "store")
    name = tmp_path.name.replace("_", "-").replace("[", "-").replace("]", "")
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        s3.new_bucket(name)
    return f"{request.param}://{name}/store"


@pytest.fixture
def store(root: str, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(root, str(tmp_path / "working-copy"))


@pytest.fixture
def make(store: ArtifactStore) -> Make:
    def build(stage: str, *inputs: ArtifactRef, size: int = 1000, **slice_: Any) -> ArtifactRef:
        named = {str(number): ref for number, ref in enumerate(inputs)}
        return store.build(stage, 1, slice_, named, text_of(size))[0]

    return build


def in_days(days: float) -> float:
    """The time at which what is made now is that old."""
    return time.time() + days * DAY


def names(entries: list[Entry]) -> list[str]:
    return [entry.stage for entry in entries]


def stages(store: ArtifactStore) -> list[str]:
    return names(survey(store))


def two_runs(make: Make) -> None:
    """dense → pruned → report, and another report of the same dense model; an adapter that no report used."""
    dense = make("dense")
    pruned = make("pruned", dense)
    make("report", pruned, dense)
    make("sweep", dense)
    make("adapter", pruned)
    make("tailored", pruned)


def test_a_survey_says_what_each_report_used(store: ArtifactStore, make: Make) -> None:
    two_runs(make)
    entries = survey(store)
    assert [(entry.stage, entry.problem) for entry in entries] == [
        (stage, None) for stage in ("adapter", "dense", "pruned", "report", "sweep", "tailored")
    ]
    assert all(entry.size > 1000 and abs(entry.used - time.time()) < 60 for entry in entries)
    used = {name[0]: sorted(names(reports)) for name, reports in reports_using(entries).items()}
    assert used == {
        "adapter": [],
        "dense": ["report", "sweep"],
        "pruned": ["report"],
        "report": ["report"],
        "sweep": ["sweep"],
        "tailored": [],
    }


def test_only_what_no_report_used_may_go_and_only_when_old(store: ArtifactStore, make: Make) -> None:
    two_runs(make)
    entries = survey(store)
    assert removable(entries, DAY) == []
    assert names(removable(entries, DAY, now=in_days(2))) == ["adapter"]  # the finished model is made of what stays
    assert removable(entries, 3 * DAY, now=in_days(2)) == []


def test_reports_that_older_versions_wrote_are_kept(store: ArtifactStore, make: Make) -> None:
    make("transfer", make("scores"))
    make("prompt-study", make("prompts"))
    assert removable(survey(store), DAY, now=in_days(400)) == []


def test_reports_beyond_the_newest_go_with_what_they_alone_used(store: ArtifactStore, make: Make) -> None:
    dense = make("dense")
    for number in range(3):
        make("report", make("pruned", dense, x=number), x=number)
    entries = [
        Entry(**{**vars(entry), "used": 1e6 * entry.manifest.config.get("x", 0)}) if entry.manifest else entry
        for entry in survey(store)
    ]
    gone = removable(entries, DAY, keep_reports=1)
    assert [(e.stage, e.manifest.config["x"]) for e in gone if e.manifest] == [
        ("report", 0),
        ("pruned", 0),
        ("report", 1),
        ("pruned", 1),
    ]
    assert names(removable(entries, DAY, keep_reports=0)[-1:]) == ["dense"]


def test_to_a_size_the_oldest_go_first_but_never_before_what_was_made_of_them(store: ArtifactStore, make: Make) -> None:
    dense = make("dense", size=5000)
    for number in range(3):
        make("pruned", dense, size=5000, x=number)
    entries = survey(store)
    total = sum(entry.size for entry in entries)
    assert removable(entries, DAY, keep_under=total, now=in_days(2)) == []
    assert names(removable(entries, DAY, keep_under=total - 1, now=in_days(2))) == ["pruned"]
    assert names(removable(entries, DAY, keep_under=6000, now=in_days(2))) == ["pruned", "pruned", "pruned"]
    assert names(removable(entries, DAY, keep_under=0, now=in_days(2))) == ["pruned", "pruned", "pruned", "dense"]


def crafted(stage: str, used: float, *inputs: str) -> Entry:
    """An artifact of 100 bytes."""
    refs = {name: ArtifactRef(name, "key", "digest") for name in inputs}
    manifest = Manifest(stage, 1, "key", {}, refs, {}, {}, 0.0, 0, {})
    return Entry(stage, "key", manifest, None, (MANIFEST,), 100, used)


def test_what_is_no_longer_needed_goes_by_its_own_age() -> None:
    entries = [crafted("adapter", 60, "dense", "speed"), crafted("dense", 50), crafted("speed", 1)]
    assert names(removable(entries, DAY, keep_under=150)) == ["adapter", "speed"]


def test_a_cycle_stays_and_a_long_chain_ends() -> None:
    assert names(removable([crafted("a", 1, "b"), crafted("b", 2, "a"), crafted("c", 3)], DAY)) == ["c"]
    chain = [crafted(f"s{number}", 0, f"s{number + 1}") for number in range(4000)]
    assert removable(chain, DAY) == chain


def test_what_was_used_lately_keeps_all_it_was_made_of(root: str, store: ArtifactStore, make: Make) -> None:
    dense = make("dense")
    make("pruned", dense)
    entries = [Entry(**{**vars(e), "used": 0.0}) if e.stage == "dense" else e for e in survey(store)]
    assert removable(entries, DAY) == []


def test_what_is_removed_is_gone_and_the_rest_is_whole(root: str, store: ArtifactStore, make: Make) -> None:
    two_runs(make)
    for entry in removable(survey(store), DAY, now=in_days(2), keep_reports=0):
        if entry.stage in ("adapter", "tailored", "sweep"):
            assert remove_artifact(store, entry)
    assert stages(store) == ["dense", "pruned", "report"]
    assert not list(store.local.glob("adapter/*"))
    assert not list(store.local.glob(".building/*"))
    assert [problem for _, problem in verify(store)] == [None] * 3


def test_what_is_being_built_or_was_used_meanwhile_stays(root: str, store: ArtifactStore, make: Make) -> None:
    ref = make("adapter")
    (entry,) = survey(store)
    with file_lock(store.lock(ref.key)):
        assert not remove_artifact(store, entry)
    os.utime(store.folder("adapter", ref.key), (0, 0))
    (entry,) = survey(store)
    os.utime(store.folder("adapter", ref.key), (entry.used + 5, entry.used + 5))  # as `find` does
    assert not remove_artifact(store, entry)
    assert stages(store) == ["adapter"]


def test_what_an_artifact_in_use_was_made_of_stays(root: str, store: ArtifactStore, make: Make) -> None:
    adapter = make("adapter", make("dense"))
    unused = removable(survey(store), DAY, now=in_days(2))
    assert names(unused) == ["adapter", "dense"]
    later = time.time() + 5
    os.utime(store.folder("adapter", adapter.key), (later, later))  # as `find` does
    assert remove_artifacts(store, unused) == []
    assert stages(store) == ["adapter", "dense"]


def test_finding_an_artifact_makes_it_young(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    ref, _ = store.build("dense", 1, {}, {}, text_of(10))
    os.utime(store.folder("dense", ref.key), (0, 0))
    assert names(removable(survey(store), DAY)) == ["dense"]
    store.open(ref)
    assert removable(survey(store), DAY) == []


def test_a_file_in_the_working_copy_does_not_stop_a_removal_at_the_url(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/store"
    ArtifactStore(url, str(tmp_path / "there")).build("dense", 1, {}, {}, text_of(10))
    here = ArtifactStore(url, str(tmp_path / "here"))
    here.local.mkdir(parents=True)
    (here.local / "dense").touch()
    assert remove_artifacts(here, entries := survey(here)) == entries
    assert survey(here) == []


def put(store: ArtifactStore, ref: ArtifactRef, name: str, content: bytes | None) -> None:
    """Change a file of an artifact where the store keeps it."""
    if store.remote:
        path = f"{store.remote.base}/{ref.stage}/{ref.key}/{name}"
        store.remote.filesystem.rm_file(path)
        if content is not None:
            store.remote.filesystem.pipe_file(path, content)
        return
    path = store.folder(ref.stage, ref.key) / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def test_a_report_that_cannot_be_read_stops_everything(root: str, store: ArtifactStore, make: Make) -> None:
    report = make("report", make("dense"))
    put(store, report, MANIFEST, b"{}")
    with pytest.raises(InputError, match=rf"^report/{report.key}: .*not a manifest .*, so what it used is not known; "):
        removable(survey(store), DAY, now=in_days(2))


def test_what_has_no_manifest_is_no_artifact_and_goes(root: str, store: ArtifactStore, make: Make) -> None:
    report = make("report", make("dense"))
    put(store, report, MANIFEST, None)
    entries = survey(store)
    assert [entry.problem for entry in entries] == [None, "manifest.json is missing"]
    for entry in removable(entries, DAY, now=in_days(2)):
        assert remove_artifact(store, entry)
    assert stages(store) == []


@pytest.mark.parametrize("content", [None, b"short", b"y" * 1000], ids=["missing", "short", "changed"])
def test_verify_finds_what_is_broken(root: str, store: ArtifactStore, make: Make, content: bytes | None) -> None:
    make("dense")
    ref = make("pruned")
    put(store, ref, "text.txt", content)
    anew = ArtifactStore(root, str(store.local.parent))
    problems = dict(verify(anew))
    assert [place.split("/")[-2] for place, problem in problems.items() if problem] == ["pruned"]
    assert all("text.txt" in problem for problem in problems.values() if problem)


def test_leftovers_of_dead_processes_are_swept_when_old(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    key, busy = "a" * 64, "b" * 64
    for name in (f".building/{key}.12345678", f".building/{busy}.12345678", f".resume/{key}"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "half.bin").write_bytes(b"x" * 100)
    store.build("dense", 1, {}, {}, text_of(1))  # leaves its lock file
    assert leftovers(store) == []
    found = leftovers(store, now=in_days(1))
    assert [(name.split("/")[0], size) for name, size in found] == [
        (".building", 100),
        (".building", 100),
        (".locks", 0),
    ]
    assert [name.split("/")[0] for name, _ in leftovers(store, now=in_days(8))].count(".resume") == 1
    with file_lock(store.lock(busy)):
        assert [remove_leftover(store, name) for name, _ in leftovers(store, now=in_days(8))].count(False) == 2
    assert [path.name for path in tmp_path.glob(".building/*")] == [f"{busy}.12345678"]
    assert not list(tmp_path.glob(".resume/*"))
    assert [path.name for path in tmp_path.glob(".locks/*")] == [busy]


def test_a_lock_file_swept_away_locks_nobody_out_and_two_in_never(tmp_path: Path) -> None:
    lock, log = tmp_path / "lock", tmp_path / "log"

    def hold(number: int) -> None:
        for _ in range(50):
            with file_lock(lock):
                with log.open("a") as file:
                    file.write(f"in {number}\n")
                    file.flush()
                    file.write(f"out {number}\n")
                lock.unlink()

    processes = [FORK.Process(target=hold, args=(number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    lines = log.read_text().splitlines()
    assert len(lines) == 300
    assert all(a.split()[1] == b.split()[1] for a, b in zip(lines[::2], lines[1::2], strict=True))
