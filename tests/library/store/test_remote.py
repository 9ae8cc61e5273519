"""A store on S3 whose server fails: never half an artifact, and the next run mends it."""

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from s3 import S3Server
from tailored_llama import preflight
from tailored_llama.config import validate_config
from tailored_llama.errors import InputError, UnreachableError
from tailored_llama.store import ArtifactStore, remove_artifact, survey
from tailored_llama.store.remote import files, names, open_remote, overwrite, read


def work(out: Path) -> None:
    for name in ("a.bin", "b.bin", "c.bin"):
        (out / name).write_bytes(name.encode() * 100_000)


class Once:
    """A fault for requests of a kind, from the n-th on, or only at that one; claims are not counted."""

    def __init__(self, what: str, method: str, nth: int, times: int = 1_000_000) -> None:
        self.what, self.method, self.nth, self.times, self.seen = what, method, nth, times, 0

    def __call__(self, method: str, path: str) -> str | None:
        if method != self.method or "/.claims/" in path:
            return None
        self.seen += 1
        return self.what if self.nth <= self.seen < self.nth + self.times else None


@pytest.fixture
def url(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path))  # where working copies are
    return f"s3://{s3.new_bucket(tmp_path.name.replace('_', '-'))}/store"


@pytest.fixture
def store(url: str, tmp_path: Path) -> Callable[[str], ArtifactStore]:
    """The store as a machine of this name sees it."""
    return lambda name: ArtifactStore(url, str(tmp_path / name))


@pytest.mark.parametrize(("what", "nth"), [("500", 1), ("drop", 3), ("500", 4)])  # 4: the manifest
def test_a_push_that_fails_is_said_and_made_good_by_the_next_run(
    s3: S3Server, url: str, store: Callable[[str], ArtifactStore], what: str, nth: int
) -> None:
    s3.fault = Once(what, "PUT", nth)
    with pytest.raises(UnreachableError, match=rf"^store.root {url}: .+ while pushing stage/\w+; nothing is lost, run"):
        store("here").build("stage", 1, {}, {}, work)
    s3.fault = lambda method, path: None
    key = next(store("here").local.glob("stage/*")).name
    assert store("there").find("stage", key) is None
    ref, was_there = store("here").build("stage", 1, {}, {}, lambda out: pytest.fail("computed again"))
    assert was_there
    assert store("there").open(ref).is_dir()


@pytest.mark.parametrize("what", ["500", "drop"])
def test_one_failure_is_asked_again(s3: S3Server, store: Callable[[str], ArtifactStore], what: str) -> None:
    s3.fault = Once(what, "PUT", 2, times=1)
    ref, _ = store("here").build("stage", 1, {}, {}, work)
    s3.fault = Once(what, "GET", 2, times=1)
    assert store("there").open(ref).is_dir()


@pytest.mark.parametrize(("what", "nth"), [("500", 1), ("drop", 3), ("half", 3)])  # 1: the manifest
def test_a_pull_that_fails_leaves_nothing_and_is_made_good_by_the_next(
    s3: S3Server, url: str, store: Callable[[str], ArtifactStore], what: str, nth: int
) -> None:
    ref, _ = store("here").build("stage", 1, {}, {}, work)
    s3.fault = Once(what, "GET", nth)
    with pytest.raises(
        UnreachableError, match=rf"^store.root {url}: .+ while (reading|pulling) stage/.+; nothing is lost, run"
    ):
        store("there").open(ref)
    s3.fault = lambda method, path: None
    assert not [path for path in store("there").local.rglob("*") if path.is_file()]
    assert store("there").open(ref).is_dir()


def test_a_removal_that_breaks_off_leaves_no_artifact_and_the_next_ends_it(
    s3: S3Server, store: Callable[[str], ArtifactStore]
) -> None:
    ref, _ = store("here").build("stage", 1, {}, {}, work)
    (entry,) = survey(store("here"))
    s3.fault = Once("500", "DELETE", 2)
    with pytest.raises(UnreachableError, match="while removing stage/"):
        remove_artifact(store("here"), entry)
    s3.fault = lambda method, path: None
    assert store("there").find("stage", ref.key) is None
    (entry,) = survey(store("here"))
    assert entry.problem == "manifest.json is missing"
    assert remove_artifact(store("here"), entry)
    assert survey(store("here")) == []


def test_a_server_that_cannot_be_asked_is_not_taken_for_an_empty_store(
    s3: S3Server, store: Callable[[str], ArtifactStore]
) -> None:
    store("here").build("stage", 1, {}, {}, work)
    s3.fault = lambda method, path: "500"
    with pytest.raises(UnreachableError, match="while reading stage/"):
        store("there").build("stage", 1, {}, {}, lambda out: pytest.fail("computed again"))


def test_the_preflight_writes_a_tiny_file_and_removes_it(own_run: dict[str, Any], s3: S3Server, url: str) -> None:
    filesystem = open_remote(url).filesystem
    own_run["store"]["root"] = url
    preflight.preflight(validate_config(own_run))
    assert filesystem.find(url) == []
    own_run["store"]["root"] = "s3://no-such-bucket/store"
    message = "store.root: got 's3://no-such-bucket/store', The specified bucket does not exist; allowed: a URL that "
    with pytest.raises(InputError, match=f"^{re.escape(message)}can be written and read$"):
        preflight.preflight(validate_config(own_run))
    own_run["store"]["root"] = url
    s3.fault = lambda method, path: "500"
    with pytest.raises(
        InputError, match=rf"^store.root: got '{url}', .+; allowed: a URL that can be written and read$"
    ):
        preflight.preflight(validate_config(own_run))


def test_without_credentials_the_preflight_says_so(
    own_run: dict[str, Any], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    own_run["store"]["root"] = url
    with pytest.raises(InputError, match=rf"^store.root: got '{url}', Unable to locate credentials; allowed: "):
        preflight.preflight(validate_config(own_run))
    s3fs.S3FileSystem.clear_instance_cache()


def test_where_there_are_no_times_a_file_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(self: Any, path: str) -> Any:
        raise NotImplementedError

    listed = [{"name": "/times/a/file", "size": 1, "type": "file"}]
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda self, path, detail: listed)
    monkeypatch.setattr(MemoryFileSystem, "modified", silent)
    before = time.time()
    ((name, (size, written)),) = files(open_remote("memory://times"), "a").items()
    assert (name, size) == ("a/file", 1)
    assert before <= written <= time.time()


def test_a_local_file_that_is_overwritten_is_never_found_in_part(tmp_path: Path) -> None:
    at = open_remote(f"file://{tmp_path}")
    old, new = b"a" * 10_000, b"b" * 20_000
    overwrite(at, "small", old)
    contents, ended = [], Event()

    def look() -> None:
        while not ended.is_set():
            contents.append(read(at, "small"))

    with ThreadPoolExecutor() as pool:
        reader = pool.submit(look)
        for content in (new, old) * 200:
            overwrite(at, "small", content)
        ended.set()
        reader.result()
    assert set(contents) <= {old, new}
    assert names(at, "") == ["small"]
