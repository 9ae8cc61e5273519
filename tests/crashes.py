"""Machines whose processes fail, stall or die at one exact step, and an object store in memory.

A step is a call that reads or changes what outlives the process: a file or folder below a root, a file lock, or an
object. What a file holds is written in one step with its opening, or not at all.
"""

import builtins
import errno
import fcntl
import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
from fsspec import AbstractFileSystem

from tailored_llama.store import publishing
from tailored_llama.store.claims import LEASE, Lease

_open = builtins.open  # of nobody's process
READS = {"stat", "lstat", "scandir", "listdir", "read", "info", "ls", "find", "cat_file", "get_file"}


class Died(BaseException):
    """The process was killed: no code of it may act on this, and none of its later steps has an effect."""


@dataclass
class Process:
    """A process that something happens to at its step number `at`; 0: nothing does.

    It "fails" with an OSError, or the process "dies before" or "dies after" it, or "meets" another one before it.
    """

    fault: str = ""
    at: int = 0
    meanwhile: Callable[[], None] = lambda: None
    steps: list[tuple[str, str]] = field(default_factory=list)  # each call, and what it was about
    dead: bool = False
    failure: Exception | None = None  # what came of it

    def step(self, call: str, about: str, act: Callable[[], Any], error: OSError) -> Any:
        if self.dead:
            raise Died
        self.steps.append((call, about))
        fault = self.fault if len(self.steps) == self.at else ""
        if fault == "fails":
            raise error
        if fault == "meets":
            self.meanwhile()
        if fault.startswith("dies"):
            with suppress(OSError):
                if fault == "dies after":
                    act()
            self.dead = True
            raise Died
        return act()

    @contextmanager
    def running(self) -> Iterator[None]:
        """What the block does, and the threads that it starts with a copy of its context, is done by this process."""
        token = _process.set(self)
        try:
            yield
        finally:
            _process.reset(token)


_process: ContextVar[Process | None] = ContextVar("process", default=None)


def record_disk(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Make steps of all calls about files below a folder."""

    def place(path: Any, folder: int | None) -> str | None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        text = os.fspath(path)
        return text[len(str(root)) + 1 :] if isinstance(text, str) and text.startswith(f"{root}/") else None

    def recorded(name: str, real: Callable[..., Any], about: int = 0) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            process = _process.get()
            if process is None:
                return real(*given, **named)
            place_ = place(given[about] if given else ".", named.get("dir_fd"))
            if place_ is None:
                return real(*given, **named)
            kind = name
            if name == "open":
                mode = named.get("mode", given[1] if len(given) > 1 else "r")
                kind = "read" if mode in ("r", "rb", os.O_RDONLY) or isinstance(mode, int) else "write"
            error = OSError(errno.EIO, os.strerror(errno.EIO), str(given[0]))
            return process.step(kind, place_, lambda: real(*given, **named), error)

        return call

    for name in ("stat", "lstat", "mkdir", "unlink", "remove", "rmdir", "utime", "scandir", "listdir", "open"):
        patch.setattr(os, name, recorded(name, getattr(os, name)))
    for name in ("rename", "replace", "link"):
        patch.setattr(os, name, recorded(name, getattr(os, name), about=1))
    patch.setattr(fcntl, "flock", recorded("flock", fcntl.flock))
    patch.setattr(publishing, "_exchange", recorded("exchange", publishing._exchange, about=1))
    opened = recorded("open", builtins.open)
    patch.setattr(builtins, "open", opened)
    patch.setattr(io, "open", opened)


class ObjectStore(AbstractFileSystem):
    """Objects in memory, as S3 keeps them: whole, without folders, created only where there is none if asked so."""

    protocol, cachable = "s3", False

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, tuple[bytes, float]] = {}

    def _step(self, call: str, path: str, act: Callable[[], Any]) -> Any:
        process = _process.get()
        return process.step(call, path, act, OSError("the server does not answer")) if process else act()

    def _info(self, path: str) -> dict[str, Any]:
        if path not in self.objects:
            raise FileNotFoundError(path)
        content, written = self.objects[path]
        return {"name": path, "size": len(content), "type": "file", "mtime": written}

    def _put(self, path: str, content: bytes, mode: str = "overwrite") -> None:
        if mode == "create" and path in self.objects:
            raise FileExistsError(path)
        self.objects[path] = content, time.time()

    def _listed(self, path: str) -> dict[str, dict[str, Any]]:
        return {name: self._info(name) for name in sorted(self.objects) if name.startswith(f"{path}/")}

    def info(self, path: str, **_: Any) -> Any:
        return self._step("info", path, lambda: self._info(path))

    def find(self, path: str, **_: Any) -> Any:
        return self._step("find", path, lambda: self._listed(path))

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        return self._step("ls", path, lambda: list(self._listed(path)))

    def cat_file(self, path: str, *_: Any, **__: Any) -> Any:
        return self._step("cat_file", path, lambda: (self._info(path), self.objects[path][0])[1])

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self._step("pipe_file", path, lambda: self._put(path, value, mode))

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        content = Path(lpath).read_bytes()
        self._step("put_file", rpath, lambda: self._put(rpath, content))

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        self._step("get_file", rpath, lambda: self._info(rpath))
        Path(lpath).write_bytes(self.objects[rpath][0])

    def rm_file(self, path: str) -> None:
        self._step("rm_file", path, lambda: self.objects.pop(path, None))


class Clock:
    """A machine's clock. It moves when the machine waits for another one's claim, or is told to let time pass.

    Args:
        along: another machine's, on which the same time passes.
    """

    def __init__(self, along: Self | None = None) -> None:
        self.time, self.along = 0.0, along
        self.patience = float("inf")  # a wait beyond this time ends with a TimeoutError
        self._thread: threading.Thread | None = None  # renews a claim
        self._due = 0.0

    @property
    def lease(self) -> Lease:
        return Lease(now=lambda: self.time, wait=self.wait)

    def wait(self, ended: threading.Event, seconds: float) -> bool:
        if seconds == LEASE.look:
            if self.time >= self.patience:
                raise TimeoutError
            self.time += seconds
            if self.along:
                self.along.let_pass(seconds)
            return False
        self._due, self._thread = self.time + seconds, threading.current_thread()
        while not ended.wait(0.0005):
            if self._due <= self.time:
                return False
        self._thread = None
        return True

    def let_pass(self, seconds: float) -> None:
        """Return when the thread that renews has done what was due."""
        while self._thread is None:
            time.sleep(0.0005)
        self.time += seconds
        while self._thread.is_alive() and self._due <= self.time:
            time.sleep(0.0005)


def run(process: Process, act: Callable[[], object]) -> Process:
    """Let a process do something, whatever becomes of it."""
    with process.running():
        try:
            act()
        except Died:
            assert process.dead
        except Exception as error:
            process.failure = error
        else:
            assert not process.dead  # no code took a death for an error
    return process


def broken(files: dict[str, bytes]) -> list[str]:
    """The artifacts (`STAGE/KEY`) among files that have a manifest and are not what it states."""
    problems = []
    for name, content in files.items():
        artifact, _, last = name.rpartition("/")
        if last == "manifest.json" and not name.startswith("."):
            stated = {n: entry["sha256"] for n, entry in json.loads(content)["files"].items()}
            found = {n: hashlib.sha256(files.get(f"{artifact}/{n}", b"")).hexdigest() for n in stated}
            if found != stated:
                problems.append(artifact)
    return problems


def files_below(folder: Path) -> dict[str, bytes]:
    """All files, by their paths; read thousands of times, so without pathlib, whose walk takes twice as long."""
    files, root = {}, f"{folder}/"
    for parent, _, names in os.walk(folder):
        for name in names:
            with _open(path := f"{parent}/{name}", "rb") as file:
                files[path.removeprefix(root)] = file.read()
    return files
