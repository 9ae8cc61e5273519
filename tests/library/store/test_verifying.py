"""Stamps: a file is hashed once on a machine, and again when anything about it has changed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tailored_llama.errors import InputError
from tailored_llama.store import MANIFEST, ArtifactRef, ArtifactStore, manifests, sha256_file, verify

HOUR = 3600 * 10**9  # nanoseconds


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed."""
    names: list[str] = []

    def note(path: Path) -> str:
        names.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(manifests, "sha256_file", note)
    return names


def age(folder: Path) -> None:
    """Let all files have been written an hour ago."""
    for path in folder.iterdir():
        time_then = path.stat().st_mtime_ns - HOUR
        os.utime(path, ns=(time_then, time_then))


def write(out: Path) -> None:
    for name in ("a.bin", "b.bin"):
        (out / name).write_bytes(name.encode() * 1000)


@pytest.fixture
def ref(root: Path) -> ArtifactRef:
    """An artifact an hour old."""
    ref, _ = ArtifactStore(str(root)).build("stage", 1, {}, {}, write)
    age(root / "stage" / ref.key)
    return ref


def open_anew(root: Path, ref: ArtifactRef) -> Path:
    """As another process would."""
    return ArtifactStore(str(root)).open(ref)


def test_what_one_process_hashed_no_other_hashes_again(root: Path, ref: ArtifactRef, hashed: list[str]) -> None:
    open_anew(root, ref)
    assert hashed == ["a.bin", "b.bin"]
    for _ in range(2):
        open_anew(root, ref)
    assert hashed == ["a.bin", "b.bin"]


def test_what_a_stage_wrote_some_time_ago_is_not_hashed_again(root: Path, hashed: list[str]) -> None:
    def work(out: Path) -> None:
        write(out)
        age(out)

    store = ArtifactStore(str(root))
    ref, _ = store.build("stage", 1, {}, {}, work)
    assert hashed == ["a.bin", "b.bin"]
    store.open(ref)
    open_anew(root, ref)
    assert hashed == ["a.bin", "b.bin"]


def touch(folder: Path) -> None:
    os.utime(folder / "a.bin", ns=(0, 0))


def replace(folder: Path) -> None:
    shutil.copy2(folder / "a.bin", folder / ".new")  # the same bytes and time
    (folder / ".new").rename(folder / "a.bin")


@pytest.mark.parametrize("change", [touch, replace])
def test_a_file_with_another_time_or_inode_is_hashed_again(
    root: Path, ref: ArtifactRef, hashed: list[str], change: Callable[[Path], None]
) -> None:
    change(open_anew(root, ref))
    hashed.clear()
    open_anew(root, ref)
    assert hashed == ["a.bin"]


def alter(path: Path) -> None:
    """Change one byte in place, and leave size, time and inode."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_altered_right_after_it_was_written_is_noticed(root: Path) -> None:
    store, calls = ArtifactStore(str(root)), []

    def work(out: Path) -> None:
        calls.append(out)
        write(out)

    ref, _ = store.build("stage", 1, {}, {}, work)
    open_anew(root, ref)
    alter(root / "stage" / ref.key / "a.bin")  # within one tick of the clock: the time did not change
    assert ArtifactStore(str(root)).build("stage", 1, {}, {}, work) == (ref, False)
    assert len(calls) == 2


def test_verify_hashes_everything_and_a_run_then_finds_what_it_found(root: Path, ref: ArtifactRef) -> None:
    open_anew(root, ref)
    alter(root / "stage" / ref.key / "a.bin")  # as a disk does
    open_anew(root, ref)  # what docs/reference/store.md says is trusted
    ((_, problem),) = verify(ArtifactStore(str(root)))
    assert problem
    assert problem.startswith("a.bin has SHA-256 ")
    assert ArtifactStore(str(root)).find("stage", ref.key) is None


def test_verify_leaves_stamps_for_the_next_run(root: Path, ref: ArtifactRef, hashed: list[str]) -> None:
    assert [problem for _, problem in verify(ArtifactStore(str(root)))] == [None]
    hashed.clear()
    open_anew(root, ref)
    assert hashed == []


STAMPS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda stamps: b"",
    "not UTF-8": lambda stamps: b"\xff" + stamps.replace(b"\n", b"\xff\n"),
    "cut short": lambda stamps: b"\n".join(line[:-1] for line in stamps.splitlines()),
    "of another inode": lambda stamps: b"\n".join(b"1" + line for line in stamps.splitlines()),
    "of other bytes": lambda stamps: b"\n".join(line[:-64] + b"0" * 64 for line in stamps.splitlines()),
}


@pytest.mark.parametrize("damage", STAMPS.values(), ids=STAMPS)
def test_a_stamp_that_is_garbage_counts_as_none(
    root: Path, ref: ArtifactRef, hashed: list[str], damage: Callable[[bytes], bytes]
) -> None:
    open_anew(root, ref)
    stamp = root / ".verified" / ref.key
    assert len(stamp.read_bytes().splitlines()) == 2
    stamp.write_bytes(damage(stamp.read_bytes()))
    hashed.clear()
    open_anew(root, ref)
    assert hashed == ["a.bin", "b.bin"]


def test_a_stamp_does_not_outlive_a_change_of_what_the_manifest_states(root: Path, ref: ArtifactRef) -> None:
    folder = open_anew(root, ref)
    manifest = folder / MANIFEST
    stated = sha256_file(folder / "a.bin")
    manifest.write_text(manifest.read_text().replace(stated, "0" * 64))
    assert ArtifactStore(str(root)).find("stage", ref.key) is None


def test_stamps_are_written_beside_a_link_and_not_to_what_it_names(root: Path, ref: ArtifactRef) -> None:
    stamp, other = root / ".verified" / ref.key, root / "a file of the reader's"
    other.write_text("kept")
    stamp.parent.mkdir(exist_ok=True)
    stamp.symlink_to(other)
    open_anew(root, ref)
    assert other.read_text() == "kept"
    assert len(stamp.read_bytes().splitlines()) == 2
    assert [path.name for path in stamp.parent.iterdir()] == [ref.key]


def test_where_stamps_cannot_be_written_a_process_hashes_each_file_once(
    root: Path, ref: ArtifactRef, hashed: list[str]
) -> None:
    (root / ".verified").touch()
    store = ArtifactStore(str(root))
    alter(store.open(ref) / "a.bin")
    store.open(ref)
    assert hashed == ["a.bin", "b.bin"]
    list(verify(store))
    assert store.find("stage", ref.key) is None


def test_stamps_go_with_their_artifact(root: Path, ref: ArtifactRef) -> None:
    open_anew(root, ref)
    stamp = root / ".verified" / ref.key
    assert stamp.is_file()
    ArtifactStore(str(root)).discard("stage", ref.key)
    assert not stamp.exists()


def test_a_working_copy_keeps_stamps_too(tmp_path: Path, hashed: list[str]) -> None:
    url = f"memory://{tmp_path.name}/store"

    def copy(name: str) -> ArtifactStore:
        return ArtifactStore(url, str(tmp_path / name))

    ref, _ = copy("here").build("stage", 1, {}, {}, write)
    age(copy("there").open(ref))
    copy("there").open(ref)
    hashed.clear()
    copy("there").open(ref)
    assert hashed == []


def test_a_pull_that_fails_leaves_stamps_and_one_that_succeeds_brings_its_own(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "_SETTLED", -1.0)  # as if hashing took long
    url = f"memory://{tmp_path.name}/store"
    here, there = ArtifactStore(url, str(tmp_path / "here")), ArtifactStore(url, str(tmp_path / "there"))
    own, _ = ArtifactStore(str(here.local)).build("stage", 1, {}, {}, write)
    ref, _ = there.build("stage", 1, {}, {}, lambda out: (out / "c.bin").write_bytes(b"whole") and None)
    assert there.remote
    file = there.remote.path(f"stage/{ref.key}/c.bin")
    there.remote.filesystem.pipe_file(file, b"other")
    hashed.clear()
    with pytest.raises(InputError, match="digest"):
        here.open(ref)
    open_anew(here.local, own)
    assert hashed == ["c.bin"]
    there.remote.filesystem.pipe_file(file, b"whole")
    for _ in range(2):
        here.open(ref)
    open_anew(here.local, ref)
    assert hashed == ["c.bin", "c.bin"]
