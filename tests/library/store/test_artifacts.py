"""The artifact store: built once, published whole, never used when broken."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tailored_llama.errors import InputError, UnreachableError
from tailored_llama.store import (
    MANIFEST,
    ArtifactRef,
    ArtifactStore,
    artifact_key,
    manifests,
    read_manifest,
    read_table,
    sha256_file,
    verify,
    write_table,
)

FORK = multiprocessing.get_context("fork")
SCHEMA = pa.schema({"group": pa.int32(), "score": pa.float32()})


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


class Work:
    """A stage's function that counts its calls."""

    def __init__(self, text: str = "a text that is long enough to be cut") -> None:
        self.calls, self.text = 0, text

    def __call__(self, out: Path) -> dict[str, Any]:
        self.calls += 1
        (out / "sub").mkdir()
        (out / "sub" / "text.txt").write_text(self.text)
        save_file({"weight": torch.full((4, 4), float(len(self.text)))}, out / "model.safetensors")
        return {"tokens": 7}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def build(root: Path | str, work: Callable[[Path], Any], stage: str = "stage", **slice_: Any) -> ArtifactRef:
    """Build in a fresh store, as another process would see it."""
    return ArtifactStore(str(root)).build(stage, 1, slice_ or {"x": 1}, {}, work)[0]


def files(root: Path) -> list[str]:
    """All that is stored, the empty lock files apart."""
    return [str(path) for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts]


def test_an_artifact_is_built_once_and_its_manifest_says_how(root: Path) -> None:
    store, work = ArtifactStore(str(root)), Work()
    source, _ = store.build("source", 1, {}, {}, Work("source"))
    ref, was_there = store.build("stage", 3, {"x": (1, 2)}, {"source": source}, work)
    again, was_there_again = ArtifactStore(str(root)).build("stage", 3, {"x": [1, 2]}, {"source": source}, work)
    assert (ref, was_there, again, was_there_again, work.calls) == (again, False, ref, True, 1)
    manifest = store.manifest(ref)
    assert (manifest.stage, manifest.version, manifest.config) == ("stage", 3, {"x": [1, 2]})
    assert (manifest.inputs, manifest.measured) == ({"source": source}, {"tokens": 7})
    assert {name: entry["size"] for name, entry in manifest.files.items()} == {
        "model.safetensors": (store.open(ref) / "model.safetensors").stat().st_size,
        "sub/text.txt": len(work.text),
    }
    assert manifest.libraries["torch"] == torch.__version__
    assert manifest.peak_memory_bytes > 1_000_000
    assert (store.open(ref) / "sub" / "text.txt").read_text() == work.text
    assert str(root) not in (store.open(ref) / MANIFEST).read_text()


def test_the_key_changes_with_all_it_names_and_with_nothing_else() -> None:
    one, two = ArtifactRef("source", "k" * 64, "1" * 64), ArtifactRef("source", "k" * 64, "2" * 64)
    key = artifact_key("stage", 1, {"x": 1, "y": 2}, {"source": one})
    others = [
        artifact_key("other", 1, {"x": 1, "y": 2}, {"source": one}),
        artifact_key("stage", 2, {"x": 1, "y": 2}, {"source": one}),
        artifact_key("stage", 1, {"x": 1, "y": 3}, {"source": one}),
        artifact_key("stage", 1, {"x": 1}, {"source": one}),
        artifact_key("stage", 1, {"x": 1, "y": 2}, {"source": two}),
        artifact_key("stage", 1, {"x": 1, "y": 2}, {"sauce": one}),
        artifact_key("stage", 1, {"x": 1, "y": 2}, {}),
    ]
    assert len({key, *others}) == 8
    assert artifact_key("stage", 1, {"y": 2, "x": 1}, {"source": one}) == key
    elsewhere = ArtifactRef("source", "another key with the same bytes", "1" * 64)
    assert artifact_key("stage", 1, {"x": 1, "y": 2}, {"source": elsewhere}) == key


def damage_manifest(**changes: Any) -> Callable[[Path, Path], None]:
    def damage(folder: Path, other: Path) -> None:
        data = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(data | changes))

    return damage


def flip(folder: Path, other: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 4
    (folder / "model.safetensors").write_bytes(data)


def link(folder: Path, other: Path) -> None:
    (folder / "sub" / "text.txt").unlink()
    (folder / "sub" / "text.txt").symlink_to(other / "sub" / "text.txt")


def link_folder(folder: Path, other: Path) -> None:
    shutil.move(folder / "sub", other / "sub-elsewhere")
    (folder / "sub").symlink_to(other / "sub-elsewhere")


def link_artifact(folder: Path, other: Path) -> None:
    folder.rename(folder.parents[2] / "elsewhere")
    folder.symlink_to(folder.parents[2] / "elsewhere")


def link_manifest(folder: Path, other: Path) -> None:
    (folder / MANIFEST).rename(folder.parents[2] / MANIFEST)
    (folder / MANIFEST).symlink_to(folder.parents[2] / MANIFEST)


def truncate(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


ENTRY = {"sha256": "0" * 64, "size": 1}
DAMAGES: dict[str, Callable[[Path, Path], Any]] = {
    "file deleted": lambda folder, other: (folder / "sub" / "text.txt").unlink(),
    "file truncated": lambda folder, other: truncate(folder, "model.safetensors"),
    "bit flipped": flip,
    "file of another artifact": lambda folder, other: shutil.copy(
        other / "model.safetensors", folder / "model.safetensors"
    ),
    "file and manifest of another artifact": lambda folder, other: shutil.copytree(other, folder, dirs_exist_ok=True),
    "symbolic link": link,
    "folder a symbolic link": link_folder,
    "artifact a symbolic link": link_artifact,
    "manifest a symbolic link": link_manifest,
    "file that the manifest does not name": lambda folder, other: (folder / "adapter_config.json").write_text("{}"),
    "manifest deleted": lambda folder, other: (folder / MANIFEST).unlink(),
    "manifest truncated": lambda folder, other: truncate(folder, MANIFEST),
    "manifest empty": lambda folder, other: (folder / MANIFEST).write_text(""),
    "manifest not UTF-8": lambda folder, other: (folder / MANIFEST).write_bytes(b'{"stage": "\xff"}'),
    "manifest a list": lambda folder, other: (folder / MANIFEST).write_text("[]"),
    "manifest of another configuration": damage_manifest(config={"x": 2}),
    "manifest of another version": damage_manifest(version=2),
    "manifest with unknown field": damage_manifest(more=1),
    "manifest's files a list": damage_manifest(files=[]),
    "manifest's file a number": damage_manifest(files={"sub/text.txt": 5}),
    "manifest's configuration a text": damage_manifest(config="x"),
    "manifest with path above": damage_manifest(files={"../../x": ENTRY}),
    "manifest with absolute path": damage_manifest(files={"/etc/passwd": ENTRY}),
    "manifest with a path that no file system takes": damage_manifest(files={"x" * 300: ENTRY}),
    "manifest with a NUL in a path": damage_manifest(files={"a\0b": ENTRY}),
    "manifest that names itself": damage_manifest(files={MANIFEST: ENTRY}),
    "manifest with a file without a hash": damage_manifest(files={"sub/text.txt": {"size": 1}}),
    "manifest with a file below a file": damage_manifest(files={"a": ENTRY, "a/b": ENTRY}),
    "manifest with seconds in words": damage_manifest(seconds="long"),
    "manifest of 5 MB": damage_manifest(measured={"text": "x" * 5_000_000}),
    "manifest nested too deep": lambda folder, other: (folder / MANIFEST).write_text("[" * 100_000),
}

NEAR_ONLY = ("symbolic link", "does not name")  # no links there; what no manifest names is not fetched
FAR_DAMAGES = {name: damage for name, damage in DAMAGES.items() if not name.endswith(NEAR_ONLY)}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_artifact_is_never_used_and_is_built_again(root: Path, damage: Callable[[Path, Path], Any]) -> None:
    work = Work()
    ref, other = build(root, work), build(root, Work("another text, as long as the one "), x=2)
    folder = ArtifactStore(str(root)).folder(ref.stage, ref.key)
    damage(folder, ArtifactStore(str(root)).folder(other.stage, other.key))
    problems = dict(verify(ArtifactStore(str(root))))
    assert problems[str(folder)]
    with pytest.raises(InputError, match=rf"^artifact stage/{ref.key[:12]}: missing from .*; run its stage again$"):
        ArtifactStore(str(root)).open(ref)
    assert build(root, work) == ref
    assert work.calls == 2
    assert (ArtifactStore(str(root)).open(ref) / "sub" / "text.txt").read_text() == work.text
    assert not list(root.glob(".building/*"))


def test_what_is_wrong_is_said(root: Path) -> None:
    refs = [build(root, Work(), x=x) for x in range(3)]
    store = ArtifactStore(str(root))
    folders = [store.folder(ref.stage, ref.key) for ref in refs]
    expected = read_manifest(folders[1]).files["sub/text.txt"]["sha256"]
    (folders[0] / "sub" / "text.txt").write_text("short")
    (folders[1] / "sub" / "text.txt").write_text("A text that is long enough to be cut")
    (folders[2] / MANIFEST).write_text("{}")
    problems = {Path(place): problem for place, problem in verify(store)}
    got = sha256_file(folders[1] / "sub" / "text.txt")
    assert problems[folders[0]] == "sub/text.txt has 5 bytes, expected 36"
    assert problems[folders[1]] == f"sub/text.txt has SHA-256 {got}, expected {expected}"
    assert problems[folders[2]] == f"{folders[2] / MANIFEST}: not a manifest ('stage': Field required)"
    damage_manifest(files={"a/../../x": ENTRY})(folders[0], folders[1])
    with pytest.raises(InputError, match=exactly(f"{folders[0] / MANIFEST}: names a file outside its folder")):
        read_manifest(folders[0])


def test_a_reference_to_other_content_is_refused(root: Path) -> None:
    ref = build(root, Work())
    wrong = ArtifactRef(ref.stage, ref.key, "0" * 64)
    message = f"artifact stage/{ref.key[:12]}: digest {ref.digest[:12]}, expected 000000000000"
    with pytest.raises(InputError, match=exactly(message)):
        ArtifactStore(str(root)).open(wrong)


def test_a_stage_that_fails_leaves_nothing(root: Path) -> None:
    def fail(out: Path) -> None:
        (out / "half.txt").write_text("half")
        raise ZeroDivisionError("stage")

    with pytest.raises(ZeroDivisionError, match="stage"):
        build(root, fail)
    assert files(root) == []
    work = Work()
    build(root, work)
    assert work.calls == 1


def test_a_killed_build_is_cleared_away_by_the_next(root: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"

    def hang(out: Path) -> None:
        (out / "half.txt").write_text("half")
        started.touch()
        time.sleep(60)

    process = FORK.Process(target=build, args=(root, hang))
    process.start()
    while not started.exists():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert [path.name for path in root.glob(".building/*/*")] == ["half.txt"]
    ref = build(root, Work())  # would wait for ever, were the lock still held
    assert not list(root.glob(".building/*"))
    assert (ArtifactStore(str(root)).open(ref) / "sub" / "text.txt").is_file()


def test_a_state_that_outlived_its_artifact_goes_when_that_is_found(root: Path) -> None:
    def work(out: Path) -> None:
        (out / "weights").write_text("whole")

    ref = build(root, work)
    state = root / ".resume" / ref.key / "state.safetensors"  # as a kill between publishing and tidying leaves it
    state.parent.mkdir(parents=True)
    state.touch()
    assert build(root, work) == ref
    assert not state.parent.exists()


def build_slowly(root: str, working_copy: Path, count: Path, results: Any) -> None:
    def work(out: Path) -> None:
        with count.open("a") as file:
            file.write("computed\n")
        time.sleep(0.3)
        (out / "text.txt").write_text("text")

    results.put(ArtifactStore(root, str(working_copy)).build("stage", 1, {}, {}, work))


def in_two_processes(root: str, working_copies: list[Path], count: Path) -> list[tuple[ArtifactRef, bool]]:
    results = FORK.Queue()
    processes = [FORK.Process(target=build_slowly, args=(root, place, count, results)) for place in working_copies]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    return found


def test_two_processes_with_the_same_key_compute_once(root: Path, tmp_path: Path) -> None:
    (first, first_found), (second, second_found) = in_two_processes(str(root), [tmp_path] * 2, tmp_path / "count")
    assert (tmp_path / "count").read_text() == "computed\n"
    assert first == second
    assert {first_found, second_found} == {False, True}


def test_two_processes_that_find_the_same_damage_both_go_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = build(root, Work())
    store = ArtifactStore(str(root))
    (store.folder(ref.stage, ref.key) / "sub" / "text.txt").write_text("damaged")
    whole = ArtifactStore.problem

    def slower(self: ArtifactStore, stage: str, key: str) -> str | None:
        problem = whole(self, stage, key)
        shutil.rmtree(self.folder(stage, key))  # the other process, between this one's look and its removal
        return problem

    monkeypatch.setattr(ArtifactStore, "problem", slower)
    assert store.find(ref.stage, ref.key) is None


def test_a_root_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root, work = tmp_path / "file" / "store", Work()
    message = f"store.root {root}: Not a directory while publishing stage; allowed: a writable folder with room"
    with pytest.raises(InputError, match=exactly(message)):
        build(root, work)
    assert work.calls == 0


def test_a_read_only_store_still_opens_what_it_has(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, work = build(root, Work()), Work()

    def refuse(path: Any, *rest: Any, **named: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for name in ("mkdir", "rename", "open", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, refuse)
    assert build(root, work) == ref
    assert (ArtifactStore(str(root)).open(ref) / "sub" / "text.txt").is_file()
    message = f"store.root {root}: Read-only file system while publishing stage; allowed: a writable folder with room"
    with pytest.raises(InputError, match=exactly(message)):
        build(root, work, x=2)
    assert work.calls == 0


FULL = {
    "in the stage": OSError(errno.ENOSPC, "No space left on device"),
    "in safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_is_the_store_s_error_and_leaves_nothing(root: Path, error: Exception) -> None:
    def fill(out: Path) -> None:
        (out / "half.txt").write_text("half")
        raise error

    message = f"store.root {root}: No space left on device while publishing stage; allowed: a writable folder with room"
    with pytest.raises(InputError, match=exactly(message)):
        build(root, fill)
    assert files(root) == []


def test_a_full_disk_at_the_last_step_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(InputError, match="No space left on device while publishing stage"):
        build(root, Work())
    assert files(root) == []


def test_a_file_of_the_user_s_that_cannot_be_read_is_not_blamed_on_the_store(root: Path) -> None:
    def read(out: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/home/user/model.safetensors")

    with pytest.raises(PermissionError, match=r"/home/user/model\.safetensors"):
        build(root, read)


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = tmp_path.name.replace("_", "-")
    if request.param == "s3":
        request.getfixturevalue("s3").new_bucket(name)
    return f"{request.param}://{name}/a/store"


def remote(url: str, path: str) -> Any:
    filesystem, base = fsspec.core.url_to_fs(url)
    return filesystem, f"{base}/{path}"


def test_what_one_machine_publishes_another_finds(url: str, tmp_path: Path) -> None:
    here, there = ArtifactStore(url, str(tmp_path / "here")), ArtifactStore(url, str(tmp_path / "there"))
    work = Work()
    ref, _ = here.build("stage", 1, {}, {}, work)
    assert there.find("stage", ref.key) == ref
    assert there.build("stage", 1, {}, {}, work) == (ref, True)
    assert work.calls == 1
    copy = there.open(ref)
    assert copy.is_relative_to(tmp_path / "there")
    (copy / "sub" / "text.txt").write_text("damaged")
    anew = ArtifactStore(url, str(tmp_path / "there"))
    assert (anew.open(ref) / "sub" / "text.txt").read_text() == work.text  # pulled again
    assert not list((tmp_path / "there").glob("*/.building/*"))


@pytest.mark.parametrize("name", ["sub/text.txt", MANIFEST])
def test_a_damaged_remote_artifact_is_not_used_and_is_replaced(url: str, tmp_path: Path, name: str) -> None:
    work = Work()
    ref, _ = ArtifactStore(url, str(tmp_path / "here")).build("stage", 1, {}, {}, work)
    filesystem, path = remote(url, f"stage/{ref.key}/{name}")
    filesystem.pipe_file(path, b"damaged")
    there = ArtifactStore(url, str(tmp_path / "there"))
    assert there.find("stage", ref.key) is None
    assert there.build("stage", 1, {}, {}, work) == (ref, False)
    assert ArtifactStore(url, str(tmp_path / "third")).find("stage", ref.key) == ref


@pytest.mark.parametrize("damage", FAR_DAMAGES.values(), ids=FAR_DAMAGES)
def test_a_damaged_artifact_behind_a_url_is_refused_and_built_again(
    url: str, tmp_path: Path, damage: Callable[[Path, Path], Any]
) -> None:
    work, here = Work(), ArtifactStore(url, str(tmp_path / "here"))
    ref, other = (
        here.build("stage", 1, {"x": x}, {}, w)[0] for x, w in ((1, work), (2, Work("another, of 23 letters")))
    )
    folder = here.folder("stage", ref.key)
    damage(folder, here.folder("stage", other.key))
    filesystem, path = remote(url, f"stage/{ref.key}")
    filesystem.rm(path, recursive=True)
    for file in folder.rglob("*"):
        if file.is_file():
            filesystem.pipe_file(f"{path}/{file.relative_to(folder)}", file.read_bytes())
    there = ArtifactStore(url, str(tmp_path / "there"))
    with pytest.raises(InputError, match=rf"^artifact stage/{ref.key[:12]}: missing from {url}; run its stage again$"):
        there.open(ref)
    assert there.build("stage", 1, {"x": 1}, {}, work) == (ref, False)
    assert work.calls == 2
    third = ArtifactStore(url, str(tmp_path / "third"))
    assert (third.open(ref) / "sub" / "text.txt").read_text() == work.text
    assert not list(tmp_path.glob("*/*/.building/*"))


def test_what_could_not_be_pushed_is_pushed_by_the_next_build(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem, _ = remote(url, "")

    def drop(*arguments: Any, **named: Any) -> None:
        raise OSError("connection lost")

    work = Work()
    with monkeypatch.context() as broken:
        broken.setattr(filesystem, "put_file", drop)
        with pytest.raises(UnreachableError, match="connection lost"):
            ArtifactStore(url, str(tmp_path / "here")).build("stage", 1, {}, {}, work)
    ref, was_there = ArtifactStore(url, str(tmp_path / "here")).build("stage", 1, {}, {}, work)
    assert (was_there, work.calls) == (True, 1)
    assert ArtifactStore(url, str(tmp_path / "there")).find("stage", ref.key) == ref


@pytest.mark.parametrize("url", ["s3"], indirect=True)  # memory:// is one process's own
def test_two_processes_behind_a_url_compute_once_on_one_machine(url: str, tmp_path: Path) -> None:
    (first, first_found), (second, second_found) = in_two_processes(url, [tmp_path / "here"] * 2, tmp_path / "count")
    assert (tmp_path / "count").read_text() == "computed\n"
    assert first == second
    assert {first_found, second_found} == {False, True}


def test_a_folder_in_the_place_of_a_manifest_at_a_url_is_none(tmp_path: Path) -> None:
    url, ref = f"file://{tmp_path}/far", ArtifactRef("stage", "0" * 64, "0" * 64)
    (tmp_path / "far" / "stage" / ref.key / MANIFEST).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"^artifact stage/0{{12}}: missing from {url}; run its stage again$"):
        ArtifactStore(url, str(tmp_path / "near")).open(ref)


def test_a_url_of_an_unknown_kind() -> None:
    message = "store.root: got 'ftps3://x', Protocol not known: ftps3; allowed: a folder or an fsspec URL"
    with pytest.raises(InputError, match=exactly(message)):
        ArtifactStore("ftps3://x")


def test_a_table_is_what_it_was_declared_to_be(tmp_path: Path) -> None:
    path = tmp_path / "importance.parquet"
    write_table(path, {"group": [0, 1], "score": [0.5, 1.5]}, SCHEMA)
    assert read_table(path, SCHEMA).to_pydict() == {"group": [0, 1], "score": [0.5, 1.5]}
    with pytest.raises(ValueError, match=exactly("importance.parquet: columns ['group'], declared ['group', 'score']")):
        write_table(path, {"group": [0]}, SCHEMA)


def test_a_table_of_another_schema_or_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "importance.parquet"
    for column, schema in {
        "score": pa.schema({"group": pa.int32(), "score": pa.float64()}),
        "group": pa.schema({"score": pa.float32()}),
    }.items():
        write_table(path, {name: [1] for name in schema.names}, schema)
        with pytest.raises(
            InputError, match=exactly(f"{path}: column {column} is not as declared (['group', 'score'])")
        ):
            read_table(path, SCHEMA)
    write_table(path, {"group": range(100), "score": [0.5] * 100}, SCHEMA)
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: not a readable Parquet file \(.*\)$"):
            read_table(path, SCHEMA)


def test_other_library_versions_are_told_once_with_both(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = manifests.installed_versions()
    refs = [build(root, Work(), x=1)]
    for torch_here in ("1.0+cpu", here["torch"] + "+other.build"):
        monkeypatch.setattr(manifests, "installed_versions", lambda own=torch_here: here | {"torch": own})
        refs.append(build(root, Work(), x=len(refs) + 1))
    monkeypatch.undo()
    store = ArtifactStore(str(root))
    store.open(refs[0])
    store.open(refs[2])  # another build of the same release
    assert not caplog.messages
    for _ in range(2):
        store.open(refs[1])
    (told,) = caplog.messages
    assert told == (
        f"stage {refs[1].key[:12]} was made with torch 1.0+cpu (here {here['torch']}): give all machines the same "
        "versions, such as those of constraints.txt"
    )
