"""Files shared between processes: digests, locks and safe relative names."""

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

_LOOK = 0.2  # seconds between two tries to get a lock
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def error_number(error: BaseException) -> int | None:
    """The errno of a failed system call, even if a Rust library (safetensors, tokenizers) wrapped it."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


@contextmanager
def file_lock(path: Path, wait: bool = True, check: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold an exclusive flock(2) on `path`; the kernel frees it when the process dies, even by kill -9.

    Yields whether the lock is held: always, unless `wait` is False and another process holds it. `check` is called a
    few times a second while another one holds it; what it raises ends the wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            held = False
            with suppress(BlockingIOError):  # another process holds it
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait and not check else fcntl.LOCK_NB))
                held = True
            if held and not _is_open_at(path, descriptor):  # housekeeping removed it between open and lock
                continue
            if wait and check and not held:
                check()
                time.sleep(_LOOK)
                continue
            yield held
            return
        finally:
            os.close(descriptor)


def _is_open_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def raise_unless_gone(error: OSError) -> None:
    """For walks: a folder that is there and cannot be listed is an error, and not an empty one."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def is_safe_relative(name: str) -> bool:
    """Whether `name` is a plain relative path that stays below its folder and that file systems accept."""
    path = PurePosixPath(name)
    plain = str(path) == name and not path.is_absolute() and not {"..", "."} & set(path.parts)
    return plain and not {"\\", "\0"} & set(name) and all(len(part.encode()) <= 255 for part in path.parts)
