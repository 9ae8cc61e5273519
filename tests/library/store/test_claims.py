"""Machines that share a URL: one computes, the others adopt, and a dead one holds nobody up for long."""

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from crashes import Clock
from s3 import S3Server
from tailored_llama.errors import UnreachableError
from tailored_llama.store import ArtifactRef, ArtifactStore, artifact_key, leftovers, remove_leftover
from tailored_llama.store.claims import CLAIMS, LEASE, Lease
from tailored_llama.store.remote import check_writable, create, names, open_remote

FORK = multiprocessing.get_context("fork")
KEY = artifact_key("stage", 1, {}, {})
DAY = 86400.0

QUICK = Lease(look=0.05)

Machine = Callable[..., ArtifactStore]


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/shared"
    name = tmp_path.name.replace("_", "-").replace("[", "-").replace("]", "")
    return f"s3://{request.getfixturevalue('s3').new_bucket(name)}/store"


@pytest.fixture
def machine(url: str, tmp_path: Path) -> Machine:
    """The store as a machine of this name sees it."""
    return lambda name, lease=QUICK: ArtifactStore(url, str(tmp_path / name), lease)


def write(text: str) -> Callable[[Path], None]:
    return lambda out: (out / "text.txt").write_text(text) and None


def build(store: ArtifactStore, text: str = "text") -> ArtifactRef:
    return store.build("stage", 1, {}, {}, write(text))[0]


def fail(out: Path) -> None:
    pytest.fail("computed again")


def there_are(store: ArtifactStore) -> list[str]:
    """The claims at the URL."""
    assert store.remote
    return names(store.remote, CLAIMS)


def plant(store: ArtifactStore, name: str, content: bytes) -> None:
    assert store.remote
    assert create(store.remote, f"{CLAIMS}/{name}", content, "planting")


def compute(machine: Machine, name: str, log: Path, seconds: float, results: Any) -> None:
    """Build, and write down that it was computed."""

    def work(out: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        (out / "text.txt").write_text(f"computed by {os.getpid()}")  # no two have the same bytes

    results.put(machine(name).build("stage", 1, {}, {}, work))


class Trial:
    """Processes on machines of their own, which all build the same artifact."""

    def __init__(self, machine: Machine, log: Path) -> None:
        self.machine, self.log, self.results = machine, log, FORK.Queue()

    def start(self, name: str, seconds: float = 0.3) -> Any:
        process = FORK.Process(target=compute, args=(self.machine, name, self.log, seconds, self.results))
        process.start()
        return process

    def wait_until_it_computes(self) -> None:
        deadline = time.monotonic() + 30
        while not self.log.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @property
    def computed(self) -> int:
        return len(self.log.read_text().split())


@pytest.fixture
def trial(machine: Machine, tmp_path: Path) -> Trial:
    return Trial(machine, tmp_path / "computed")


def test_of_machines_that_start_at_once_one_computes_and_later_stages_agree(trial: Trial, machine: Machine) -> None:
    processes = [trial.start(name) for name in ("one", "two", "three")]
    for process in processes:
        process.join(30)
    results = [trial.results.get(timeout=10) for _ in processes]
    assert trial.computed == 1
    assert len({ref for ref, _ in results}) == 1
    assert sorted(was_there for _, was_there in results) == [False, True, True]
    ref = results[0][0]
    texts = {(machine(name).open(ref) / "text.txt").read_bytes() for name in ("one", "two", "three", "four")}
    assert len(texts) == 1
    later, _ = machine("one").build("later", 1, {}, {"source": ref}, write("later"))
    assert machine("two").build("later", 1, {}, {"source": ref}, fail) == (later, True)
    assert there_are(machine("one")) == []


def test_a_stage_longer_than_the_lease_is_not_taken_over(machine: Machine) -> None:
    first = Clock()
    second = Clock(along=first)
    second.patience = 2 * LEASE.expires

    def work(out: Path) -> None:
        with pytest.raises(TimeoutError):
            machine("two", second.lease).build("stage", 1, {}, {}, fail)
        (out / "text.txt").write_text("text")

    ref, _ = machine("one", first.lease).build("stage", 1, {}, {}, work)
    assert machine("two").build("stage", 1, {}, {}, fail) == (ref, True)


def test_a_holder_that_falls_silent_is_taken_over_when_its_lease_has_expired(machine: Machine) -> None:
    plant(machine("one"), f"{KEY}.1", json.dumps({"token": "by-one", "holder": "one"}).encode())
    clock = Clock()
    build(machine("two", clock.lease))
    assert LEASE.expires < clock.time <= LEASE.expires + 2 * LEASE.look
    assert there_are(machine("two")) == []


def test_a_killed_holder_keeps_its_own_machine_waiting_for_nothing(trial: Trial, machine: Machine) -> None:
    first = trial.start("one", seconds=60)
    trial.wait_until_it_computes()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert there_are(machine("one")) == [f"{KEY}.1"]
    clock = Clock()
    build(machine("one", clock.lease))
    assert clock.time == 0
    assert there_are(machine("one")) == []


@pytest.mark.parametrize("url", ["file"], indirect=True)
def test_who_holds_it_is_said_once(trial: Trial, machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tailored_llama")
    first = trial.start("one")
    trial.wait_until_it_computes()
    assert machine("two").build("stage", 1, {}, {}, fail)[1]
    first.join()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"stage {KEY[:12]}: {os.uname().nodename}, process {first.pid} has it in hand, waiting"


@pytest.mark.parametrize("url", ["file"], indirect=True)
def test_a_machine_that_waits_ends_at_once_when_it_is_told_to(trial: Trial, machine: Machine) -> None:
    first = trial.start("one", seconds=60)
    trial.wait_until_it_computes()

    def wait() -> None:
        signal.signal(signal.SIGTERM, lambda *_: exec("raise SystemExit(7)"))  # as Prefect raises its own
        build(machine("two", Lease(wait=lambda event, seconds: waits.set() or event.wait(60))))

    waits = FORK.Event()
    second = FORK.Process(target=wait)
    second.start()
    assert waits.wait(30)
    os.kill(second.pid or 0, signal.SIGTERM)
    second.join(5)
    os.kill(first.pid, signal.SIGKILL)
    assert second.exitcode == 7
    assert there_are(machine("two")) == [f"{KEY}.1"]


def test_a_stage_that_fails_or_is_stopped_gives_its_claim_back(machine: Machine) -> None:
    for error in (ValueError, KeyboardInterrupt):

        def raise_it(out: Path, error: type[BaseException] = error) -> None:
            assert there_are(machine("one")) == [f"{KEY}.1"]
            raise error

        with pytest.raises(error):
            machine("one").build("stage", 1, {}, {}, raise_it)
        assert there_are(machine("one")) == []
    build(machine("two"))


def test_the_one_that_publishes_later_adopts_what_is_published(machine: Machine) -> None:
    """Two compute although there are claims: the first was cut off for longer than its lease."""
    published: list[ArtifactRef] = []

    def be_overtaken(out: Path) -> None:
        plant(machine("two"), f"{KEY}.2", json.dumps({"token": "by-two", "holder": "two"}).encode())
        mark = machine("two").lock(KEY)
        mark.parent.mkdir(parents=True)
        mark.write_text("by-two")
        published.append(build(machine("two"), "of two"))
        (out / "text.txt").write_text("of one")

    ref, was_there = machine("one").build("stage", 1, {}, {}, be_overtaken)
    assert ([ref], was_there) == (published, False)
    for name in ("one", "two", "three"):
        assert (machine(name).open(ref) / "text.txt").read_text() == "of two"
    later, _ = machine("two").build("later", 1, {}, {"source": ref}, write("later"))
    assert machine("one").build("later", 1, {}, {"source": ref}, fail) == (later, True)


def test_what_was_made_but_not_pushed_gives_way_to_what_is_published(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(*arguments: Any, **named: Any) -> None:
        raise OSError("connection lost")

    store = machine("one")
    assert store.remote
    with monkeypatch.context() as broken:
        broken.setattr(store.remote.filesystem, "put_file", drop)
        with pytest.raises(UnreachableError):
            build(store, "of one")
    ref = build(machine("two", Clock().lease), "of two")  # one is not heard of again
    assert (machine("one").open(ref) / "text.txt").read_text() == "of two"
    assert machine("one").build("stage", 1, {}, {}, fail) == (ref, True)


@pytest.mark.parametrize("url", ["s3"], indirect=True)
@pytest.mark.parametrize(("path", "computed"), [("/.claims/", 0), ("manifest.json", 1)])
def test_a_server_that_fails_at_the_claim_or_the_manifest(
    machine: Machine, s3: S3Server, path: str, computed: int
) -> None:
    calls: list[Path] = []

    def work(out: Path) -> None:
        calls.append(out)
        (out / "text.txt").write_text("text")

    s3.fault = lambda method, at: "500" if method == "PUT" and path in at else None
    with pytest.raises(UnreachableError, match="nothing is lost, run it again"):
        machine("one").build("stage", 1, {}, {}, work)
    assert len(calls) == computed
    s3.fault = lambda method, at: "500"
    with pytest.raises(UnreachableError):
        machine("one").build("stage", 1, {}, {}, work)
    s3.fault = lambda method, at: "500" if method == "PUT" else None
    with pytest.raises(UnreachableError):
        machine("one").build("stage", 1, {}, {}, work)
    s3.fault = lambda method, at: None
    clock = Clock()
    ref, _ = machine("one", clock.lease).build("stage", 1, {}, {}, work)
    assert clock.time == 0
    assert len(calls) == 1
    assert machine("two").build("stage", 1, {}, {}, fail) == (ref, True)
    assert there_are(machine("one")) == []


@pytest.mark.parametrize("url", ["s3"], indirect=True)
@pytest.mark.parametrize("path", ["/.claims/", "manifest.json"])
def test_a_write_whose_answer_was_lost_is_known_as_one_s_own(machine: Machine, s3: S3Server, path: str) -> None:
    lost: list[str] = []

    def lose_the_first(method: str, at: str) -> str | None:
        if method == "PUT" and path in at and not lost:
            lost.append(at)
            return "lost"
        return None

    s3.fault = lose_the_first
    ref = build(machine("one"))
    assert len(lost) == 1
    assert machine("two").find("stage", KEY) == ref
    assert there_are(machine("one")) == []


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_a_server_that_is_away_for_longer_than_the_lease(machine: Machine, s3: S3Server) -> None:
    clock = Clock()

    def work(out: Path) -> None:
        s3.fault = lambda method, path: "500"
        clock.let_pass(LEASE.expires + 1)
        s3.fault = lambda method, path: None
        (out / "text.txt").write_text("text")

    ref, _ = machine("one", clock.lease).build("stage", 1, {}, {}, work)
    assert machine("two").find("stage", KEY) == ref
    assert there_are(machine("one")) == []


GARBAGE = {
    "empty": b"",
    "not UTF-8": b'{"token": "\xff"}',
    "a list": b"[]",
    "no token": b'{"holder": "x"}',
    "nested too deep": b"[" * 100_000,
    "empty token": b'{"token": "", "holder": "x"}',
}


@pytest.mark.parametrize("url", ["file"], indirect=True)
@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_claim_that_is_garbage_expires_like_any(machine: Machine, content: bytes) -> None:
    plant(machine("one"), f"{KEY}.999999999999999999", content)
    clock = Clock()
    build(machine("one", clock.lease))
    assert clock.time > LEASE.expires


@pytest.mark.parametrize("url", ["file"], indirect=True)
def test_names_that_are_no_claims_are_no_claims(machine: Machine) -> None:
    others = [f"{KEY}.x", f"{KEY}.007", f"{KEY}.-1", KEY, f"{'f' * 64}.1", f"{KEY}.1.tmp"]
    for name in others:
        plant(machine("one"), name, b"{}")
    build(machine("one"))
    assert sorted(there_are(machine("one"))) == sorted(others)


def test_housekeeping_removes_claims_that_nobody_renewed_for_hours(machine: Machine) -> None:
    plant(machine("one"), f"{KEY}.1", b"{}")
    assert leftovers(machine("one")) == []
    assert leftovers(machine("one"), now=time.time() + DAY) == [(f".claims/{KEY}.1", 2)]
    assert remove_leftover(machine("one"), f".claims/{KEY}.1")
    assert there_are(machine("one")) == []


def test_a_file_is_created_only_where_there_is_none(machine: Machine) -> None:
    store = machine("one").remote
    assert store
    assert create(store, "a/file", b"first", "testing")
    assert not create(store, "a/file", b"second", "testing")
    assert create(store, "a/file", b"first", "testing")  # as sent again
    assert names(store, "a") == ["file"]
    assert store.filesystem.cat_file(f"{store.base}/a/file") == b"first"


def test_a_file_that_its_writer_removes_before_it_is_read_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: Any, path: str) -> bytes:
        os.remove(path)
        raise FileNotFoundError(path)

    store = open_remote(f"file://{tmp_path}")
    assert create(store, "file", b"first", "testing")
    monkeypatch.setattr(LocalFileSystem, "cat_file", gone)
    assert create(store, "file", b"second", "testing")
    assert (tmp_path / "file").read_bytes() == b"second"


def test_s3_s_request_to_send_a_write_again_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    conflict = OSError("conflict")
    conflict.response = {"Error": {"Code": "ConditionalRequestConflict"}}  # type: ignore[attr-defined]
    tries: list[str] = []
    pipe = MemoryFileSystem.pipe_file

    def conflict_once(self: Any, path: str, *rest: Any, **named: Any) -> None:
        tries.append(path)
        if len(tries) == 1:
            raise OSError("try again") from conflict
        pipe(self, path, *rest, **named)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", conflict_once)
    assert create(open_remote("memory://conflict"), "file", b"content", "testing")
    assert len(tries) == 2


def test_a_server_that_overwrites_although_asked_not_to_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_writable(open_remote("memory://obeys"))
    assert not caplog.records
    pipe = MemoryFileSystem.pipe_file
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, value, **_: pipe(self, path, value))
    check_writable(open_remote("memory://disobeys"))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == (
        "store.root memory://disobeys: it overwrites files although it is asked not to; use it on one machine"
    )


def test_whoever_is_cancelled_waits_no_longer_for_another_machine(machine: Machine) -> None:
    here = machine("here", Lease(look=0.05, expires=5.0))  # without a check it would take over
    plant(here, f"{KEY}.1", json.dumps({"holder": "another", "token": "other"}).encode())

    def check() -> None:
        raise InterruptedError("the run was cancelled")

    with pytest.raises(InterruptedError):
        here.build("stage", 1, {}, {}, fail, check)
    assert here.find("stage", KEY) is None
    assert there_are(here) == [f"{KEY}.1"]
