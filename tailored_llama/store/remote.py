"""The remote side of a store, behind an fsspec URL. The manifest is written last and removed first."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from tailored_llama.errors import InputError, UnreachableError, one_line
from tailored_llama.store.files import NO_ROOM

_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "az"}  # no folders: creating one would create a bucket
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")  # field names in different filesystems


@dataclass(frozen=True)
class Remote:
    """A folder behind a URL."""

    root: str  # as the user wrote it
    filesystem: Any
    base: str


def open_remote(root: str) -> Remote:
    """The folder of an fsspec URL; no request is sent yet.

    Raises:
        InputError: the protocol is unknown, or its package is not installed.
    """
    try:
        return Remote(root, *fsspec.core.url_to_fs(root))
    except (ImportError, ValueError) as error:
        raise InputError(f"store.root: got {root!r}, {error}; allowed: a folder or an fsspec URL") from None


def is_there(remote: Remote, name: str) -> bool:
    """Whether a file of this name exists; a server that does not answer is an error, not a no."""
    with _request(remote, f"looking for {name}"):
        try:
            remote.filesystem.info(f"{remote.base}/{name}")
        except FileNotFoundError:
            return False
        return True


def push(remote: Remote, folder: Path, target: str, names: Sequence[str]) -> None:
    """Copy files of a local folder into `target`, in this order.

    Raises:
        InputError: writing is not permitted, or the bucket does not exist.
        UnreachableError: the server failed; the same push may succeed later.
    """
    filesystem, base = remote.filesystem, f"{remote.base}/{target}"
    with _request(remote, f"pushing {target}"):
        for name in names:
            _make_parent(filesystem, f"{base}/{name}")
            try:
                filesystem.put_file(str(folder / name), f"{base}/{name}")
            except FileNotFoundError as error:
                if error.filename:
                    raise
                raise _refused(remote, f"pushing {target}", error) from error  # no such bucket


def pull(remote: Remote, source: str, names: Sequence[str], folder: Path) -> None:
    """Copy files from `source` into a local folder.

    Raises:
        FileNotFoundError: a file does not exist.
        InputError, UnreachableError: as `push`.
    """
    with _request(remote, f"pulling {source}"):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            remote.filesystem.get_file(f"{remote.base}/{source}/{name}", str(folder / name))


def written(remote: Remote, name: str) -> float:
    """When a file was written, in seconds since 1970.

    Raises:
        FileNotFoundError, InputError, UnreachableError: as `pull`.
    """
    with _request(remote, f"looking for {name}"):
        path = f"{remote.base}/{name}"
        return _written(remote.filesystem, path, remote.filesystem.info(path))


def files(remote: Remote) -> dict[str, tuple[int, float]]:
    """Every file below the root: name → size in bytes, and when it was written (seconds since 1970)."""
    filesystem, base = remote.filesystem, remote.base
    with _request(remote, "listing it"):
        filesystem.invalidate_cache()  # another machine may have written since
        try:
            listing = filesystem.find(base, detail=True)
        except FileNotFoundError:
            listing = {}
        filesystem.invalidate_cache()
        return {
            path.removeprefix(base).lstrip("/"): (int(info["size"] or 0), _written(filesystem, path, info))
            for path, info in listing.items()
        }


def read(remote: Remote, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of small files; files that no longer exist are left out."""
    paths = {f"{remote.base}/{name}": name for name in names}
    with _request(remote, "reading manifests"):
        contents = remote.filesystem.cat(list(paths), on_error="return") if paths else {}
        for content in contents.values():
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                raise content
        return {paths[path]: content for path, content in contents.items() if isinstance(content, bytes)}


def remove(remote: Remote, folder: str, names: Sequence[str]) -> None:
    """Remove files of a folder, in this order; files that no longer exist are skipped."""
    with _request(remote, f"removing {folder}"):
        for name in names:
            try:
                remote.filesystem.rm_file(f"{remote.base}/{folder}/{name}")
            except FileNotFoundError:
                continue
        if _has_folders(remote.filesystem) and remote.filesystem.isdir(f"{remote.base}/{folder}"):
            remote.filesystem.rm(f"{remote.base}/{folder}", recursive=True)


def check_writable(remote: Remote) -> None:
    """Check that a tiny file can be written, read and removed.

    Raises:
        InputError: one of these fails.
    """
    path, content = f"{remote.base}/.written-{uuid.uuid4().hex[:8]}", b"tailored"
    try:
        _make_parent(remote.filesystem, path)
        remote.filesystem.pipe_file(path, content)
        whole = remote.filesystem.cat_file(path) == content
        remote.filesystem.rm_file(path)
        if not whole:
            raise OSError("it returns other bytes than were written")
    except Exception as error:  # each filesystem, and the library below it, has its own types
        raise InputError(
            f"store.root: got {remote.root!r}, {one_line(error)}; allowed: a URL that can be written and read"
        ) from None


def _make_parent(filesystem: Any, path: str) -> None:
    if _has_folders(filesystem):
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)


def _has_folders(filesystem: Any) -> bool:
    protocol = filesystem.protocol
    return not _BUCKETS & set([protocol] if isinstance(protocol, str) else protocol)


def _written(filesystem: Any, path: str, info: dict[str, Any]) -> float:
    value: Any = next((info[name] for name in _TIMES if info.get(name) is not None), None)
    if value is None:
        try:
            value = filesystem.modified(path)
        except NotImplementedError:  # unknown: counts as new, so that housekeeping keeps it
            return time.time()
    if isinstance(value, str):  # Google Cloud Storage
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)


@contextmanager
def _request(remote: Remote, action: str) -> Iterator[None]:
    """Name the store in errors, and tell errors the user must fix from transient ones."""
    try:
        yield
    except FileNotFoundError:
        raise
    except PermissionError as error:
        if error.filename:  # a local file
            raise
        raise _refused(remote, action, error) from error
    except InputError:
        raise
    except Exception as error:  # botocore's, aiohttp's, paramiko's …
        if isinstance(error, OSError) and (error.filename or error.errno in NO_ROOM):
            raise
        raise UnreachableError(
            f"store.root {remote.root}: {one_line(error)} while {action}; nothing is lost, run it again"
        ) from error


def _refused(remote: Remote, action: str, error: Exception) -> InputError:
    return InputError(
        f"store.root {remote.root}: {one_line(error)} while {action}; allowed: a URL that can be written and read"
    )
