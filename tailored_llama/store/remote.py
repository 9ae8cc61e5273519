"""The remote side of a store, behind an fsspec URL: artifacts are fetched whole or not at all, and published once.

Functions that send requests raise an `InputError` where access is refused or the bucket does not exist, and an
`UnreachableError` where the server fails: then the same request may succeed later.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import fsspec

from tailored_llama.errors import InputError, UnreachableError, one_line, secret_in
from tailored_llama.store import manifests
from tailored_llama.store.files import NO_ROOM
from tailored_llama.store.manifests import MANIFEST, ArtifactRef

log = logging.getLogger(__name__)

_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "az"}  # no folders: creating one would create a bucket
_TIMES = ("LastModified", "last_modified", "mtime", "created")  # field names in different filesystems


@dataclass(frozen=True)
class Remote:
    """A folder behind a URL."""

    root: str  # as the user wrote it
    filesystem: Any
    base: str

    def path(self, name: str) -> str:
        return f"{self.base}/{name}"

    @property
    def has_folders(self) -> bool:
        protocol = self.filesystem.protocol
        return not _BUCKETS & set([protocol] if isinstance(protocol, str) else protocol)

    @property
    def is_local(self) -> bool:
        return bool(getattr(self.filesystem, "local_file", False))


def open_remote(root: str) -> Remote:
    """The folder behind an fsspec URL; no request is sent yet.

    InputError: there is a secret in the URL, or a package that it needs is not installed.
    """
    if told := secret_in(root):
        raise InputError(f"store.root: {told}")
    try:
        return Remote(root, *fsspec.core.url_to_fs(root))
    except (ImportError, ValueError) as error:
        raise InputError(f"store.root: got {root!r}, {error}; allowed: a folder or an fsspec URL") from None


def fetch(remote: Remote, stage: str, key: str, content: bytes, folder: Path) -> tuple[str | None, set[str]]:
    """Copy an artifact with this manifest, and its time, from the URL to a new folder, and `check` it."""
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_bytes(content)
    try:
        manifest = manifests.read_manifest(folder)
        manifests.check_identity(manifest, stage, key)
    except InputError as error:
        return str(error), set()
    source = remote.path(f"{stage}/{key}")
    try:
        with _request(remote, f"pulling {stage}/{key}"):
            for name in manifest.files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                remote.filesystem.get_file(f"{source}/{name}", str(folder / name))
            published = _written(remote, remote.filesystem.info(f"{source}/{MANIFEST}"))
    except FileNotFoundError as error:
        return f"{one_line(error)} is missing", set()
    os.utime(folder / MANIFEST, (published, published))
    return manifests.check(folder, stage, key, set())


def push(remote: Remote, folder: Path, ref: ArtifactRef, is_lost: Callable[[], bool]) -> bool:
    """Push an artifact that is not at the URL, with the claim to it; False if another machine published one first."""
    target = f"{ref.stage}/{ref.key}"
    for name in manifests.read_manifest(folder).files:
        if is_lost():  # the claim; another machine may be pushing
            return False
        with _request(remote, f"pushing {target}", writes=True):
            path = remote.path(f"{target}/{name}")
            _make_parent(remote, path)
            remote.filesystem.put_file(str(folder / name), path)
    manifest = (folder / MANIFEST).read_bytes()  # the last: it makes the artifact
    return create(remote, f"{target}/{MANIFEST}", manifest, f"pushing {target}")


def create(remote: Remote, name: str, content: bytes, action: str) -> bool:
    """Write a small file where none is; return False if there is one with other content. Errors name the action."""
    with _request(remote, action, writes=True):
        return _create(remote, remote.path(name), content)


def overwrite(remote: Remote, name: str, content: bytes) -> None:
    """Write a small file, whatever is there. Readers find the old content or the new, in full (by SFTP maybe less)."""
    with _request(remote, f"writing {name}"):
        _put(remote, remote.path(name), content, "overwrite")


def files(remote: Remote, folder: str = "") -> dict[str, tuple[int, float]]:
    """Every file below the root, or a folder there: name → size in bytes, when it was written (seconds since 1970)."""
    with _request(remote, f"listing {folder or 'it'}"):
        return {
            info["name"].removeprefix(remote.base).lstrip("/"): (int(info["size"] or 0), _written(remote, info))
            for info in _find(remote, remote.path(folder) if folder else remote.base)
        }


def _find(remote: Remote, folder: str) -> Iterator[dict[str, Any]]:
    """Every file below a folder. Where one cannot be listed, fsspec's `find` and `walk` leave it out; this fails."""
    with suppress(FileNotFoundError):
        if not remote.has_folders:
            yield from remote.filesystem.find(folder, detail=True).values()
            return
        for info in remote.filesystem.ls(folder, detail=True):
            if info["type"] == "directory":
                yield from _find(remote, info["name"])
            else:
                yield info


def names(remote: Remote, folder: str) -> list[str]:
    """The names in a folder; none if it does not exist."""
    with _request(remote, f"listing {folder}"), suppress(FileNotFoundError):
        return [path.rpartition("/")[2] for path in remote.filesystem.ls(remote.path(folder), detail=False)]
    return []


def read(remote: Remote, name: str) -> bytes | None:
    """The content of a small file; None if it does not exist."""
    return read_all(remote, [name]).get(name)


def read_all(remote: Remote, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of small files, read at once; those that do not exist are left out."""
    paths = {remote.path(name): name for name in names}
    with _request(remote, f"reading {names[0] if len(names) == 1 else 'small files'}"):
        contents = remote.filesystem.cat(list(paths), on_error="return") if paths else {}
        for content in contents.values():
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError | IsADirectoryError):
                raise content
        return {paths[path]: content for path, content in contents.items() if isinstance(content, bytes)}


def remove_files(remote: Remote, names: Sequence[str]) -> None:
    """Remove files, in this order; files that no longer exist are skipped."""
    for name in names:
        with _request(remote, f"removing {name}"), suppress(FileNotFoundError):
            remote.filesystem.rm_file(remote.path(name))


def remove_folder(remote: Remote, folder: str) -> None:
    """Remove a folder that no files are in, where there are folders."""
    with _request(remote, f"removing {folder}"):
        if remote.has_folders and remote.filesystem.isdir(remote.path(folder)):
            remote.filesystem.rm(remote.path(folder), recursive=True)


def check_writable(remote: Remote) -> None:
    """Check that a tiny file can be written, read and removed; an `InputError` if not, for whatever reason."""
    path, content = remote.path(f".written-{uuid.uuid4().hex[:8]}"), b"tailored"
    try:
        _create(remote, path, content)
        whole = remote.filesystem.cat_file(path) == content
        keeps = not _create(remote, path, b"other")
        remote.filesystem.rm_file(path)
        if not whole:
            raise OSError("it returns other bytes than were written")
    except Exception as error:  # each filesystem, and the library below it, has its own types
        raise InputError(
            f"store.root: got {remote.root!r}, {one_line(error)}; allowed: a URL that can be written and read"
        ) from None
    if not keeps:
        warning = "store.root %s: it overwrites files although it is asked not to; use it on one machine"
        log.warning(warning, remote.root)


def _create(remote: Remote, path: str, content: bytes) -> bool:
    """Write a file where none is; return False if there is one with other content.

    Whether there is one is read from the store, not from the error: each library has its own errors for it, and a
    request whose answer was lost is sent again and then meets the file that it wrote.
    """
    _make_parent(remote, path)
    for _ in range(3):
        try:
            _put(remote, path, content, "create")
            return True
        except Exception as error:
            try:
                return bool(remote.filesystem.cat_file(path) == content)
            except FileNotFoundError:
                if not _is_conflict(error):
                    raise error from None
    raise TimeoutError("other machines write it at the same time")


def _put(remote: Remote, path: str, content: bytes, mode: Literal["create", "overwrite"]) -> None:
    """Write a file. A local one is written beside its path, which it takes in one step: nobody finds half of it."""
    if not remote.is_local:
        remote.filesystem.pipe_file(path, content, mode=mode)  # S3: If-None-Match
        return
    new = f"{path}.{uuid.uuid4().hex[:8]}"
    try:
        remote.filesystem.pipe_file(new, content)
        with open(new, "rb") as file:
            os.fchmod(file.fileno(), 0o644)  # whoever shares the store has to read it
            os.fsync(file.fileno())  # it survives a crash
        if mode == "overwrite":
            os.replace(new, path)
        else:
            _link(new, path, content)
    finally:
        with suppress(FileNotFoundError):
            remote.filesystem.rm_file(new)


def _link(new: str, path: str, content: bytes) -> None:
    """Give a file a name that none has. Without hard links, as on exFAT, a reader may find it before it is whole."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _is_conflict(error: BaseException) -> bool:
    """Whether a write is to be tried again: the file in its way is gone, or S3 had another write of it in progress."""
    response = getattr(error.__cause__, "response", None) or {}
    return isinstance(error, FileExistsError) or response.get("Error", {}).get("Code") == "ConditionalRequestConflict"


def _make_parent(remote: Remote, path: str) -> None:
    if remote.has_folders:
        remote.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)


def _written(remote: Remote, info: dict[str, Any]) -> float:
    value: Any = next((info[name] for name in _TIMES if info.get(name) is not None), None)
    if value is None:
        try:
            value = remote.filesystem.modified(info["name"])
        except NotImplementedError:  # unknown: counts as new, so that housekeeping keeps it
            return time.time()
    return value.timestamp() if isinstance(value, datetime) else float(value)


@contextmanager
def _request(remote: Remote, action: str, writes: bool = False) -> Iterator[None]:
    """Name the store in errors, and tell errors the user must fix from transient ones.

    A file that is not found is an answer; where a file is written, it is the bucket.
    """
    try:
        remote.filesystem.invalidate_cache()  # another machine may have written since
        yield
    except Exception as error:  # botocore's, aiohttp's, paramiko's …
        is_answer = isinstance(error, FileNotFoundError) and not writes
        is_local = isinstance(error, OSError) and (error.filename or error.errno in NO_ROOM)
        if is_answer or is_local or isinstance(error, InputError):
            raise
        said = f"store.root {remote.root}: {one_line(error)} while {action}"
        if isinstance(error, FileNotFoundError | PermissionError):
            raise InputError(f"{said}; allowed: a URL that can be written and read") from error
        raise UnreachableError(f"{said}; nothing is lost, run it again") from error
