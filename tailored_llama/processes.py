"""Worker processes of this machine: they stay warm between two calls, and end with the process that started them.

`concurrent.futures` was tried with a pool for each process. A program that ends waits for every call that such a pool
has under way, and a pool's process outlives a program that is killed.
"""

import atexit
import logging
import math
import os
import queue
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from functools import cache, partial
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from threading import Lock, Thread, main_thread
from types import SimpleNamespace
from typing import Any

from tailored_llama.console import quiet_libraries
from tailored_llama.progress import Progress, silent

_LOOK = 0.2  # seconds between two calls of a check


class Killed(RuntimeError):
    """Raised when a process was killed, by a person or because memory ran out."""


def check_main() -> None:
    """End the work of a thread whose program ends: Python would wait for its processes before it exits."""
    if not main_thread().is_alive():
        raise RuntimeError("the program has ended")


@cache
def forking() -> Any:
    """The context of processes that are forked from one which has imported what stages need, and has used no GPU."""
    from multiprocessing import get_context

    context = get_context("forkserver")
    context.set_forkserver_preload(["tailored_llama.pipeline.forked"])
    return context


class Worker:
    """A process that makes one call after another."""

    def __init__(self) -> None:
        self.connection, there = forking().Pipe()
        self.process = forking().Process(target=_serve, args=(there,))
        self.process.start()
        there.close()  # so that the end of the process is the end of the connection
        atexit.register(self.kill)

    def kill(self) -> None:
        atexit.unregister(self.kill)
        self.process.kill()
        self.process.join()
        self.connection.close()


def call_in(
    workers: Sequence[Worker],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    progress: Progress,
    check: Callable[[], None],
) -> Any:
    """Call a function in some workers at once; returns what the first of them returned.

    Args:
        workers: all are killed if one has not answered when the call ends.
        function: called with its rank, what reports progress, and `arguments`; all can be pickled.
        progress: called with the progress of the first worker. Its log records are passed on, too.
        check: called a few times a second; what it raises ends the call.

    Raises:
        Exception: the first that a worker raised; others only follow from it.
        Killed: a worker was killed.
    """
    for rank, worker in enumerate(workers):
        with suppress(BrokenPipeError):  # it is killed: the answer says so
            worker.connection.send((function, rank, arguments))
    waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
    results: dict[int, Any] = {}
    errors: list[Exception] = []
    end = math.inf
    try:
        while waiting and time.monotonic() < end:
            for connection in wait(list(waiting), _LOOK):
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                try:
                    kind, message = connection.recv()
                except (EOFError, ConnectionError):
                    kind, message = "error", _ended(workers[rank], rank)
                if kind == "log":
                    if (log := logging.getLogger(message.name)).isEnabledFor(message.levelno):
                        log.handle(message)
                elif kind == "progress":
                    progress(*message)
                else:
                    del waiting[connection]
                    results[rank] = message
                    if kind == "error":
                        errors.append(message)
                        end = min(end, time.monotonic() + _LOOK)  # what the others say until then is passed on
            check()
    finally:
        if waiting:
            for worker in workers:
                worker.kill()
    if errors:
        raise errors[0]
    return results[0]


def _ended(worker: Worker, rank: int) -> Exception:
    """The error of a worker that has ended without an answer."""
    worker.process.join()
    code = worker.process.exitcode
    killed = code == -signal.SIGKILL
    return Killed(f"process {rank} was killed") if killed else RuntimeError(f"process {rank} ended with {code}")


def run_processes(
    function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], progress: Progress, count: int = 1
) -> dict[str, Any]:
    """Call a function in new processes, as `call_in` does in workers; returns what the first of them returned."""
    workers = [Worker() for _ in range(count)]
    try:
        returned: dict[str, Any] = call_in(workers, function, arguments, progress, check_main)
        return returned
    finally:
        for worker in workers:
            worker.kill()


def _serve(connection: Connection) -> None:
    """The work of a worker: answer calls until the process that started it has ended, in whatever way."""
    lock = Lock()

    def send(kind: str, message: Any) -> None:
        with lock:
            connection.send((kind, message))

    def read() -> None:
        try:
            while True:
                inbox.put(connection.recv())
        finally:
            os.kill(os.getpid(), signal.SIGKILL)  # else it would work on for nobody

    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the program, and that its workers
    Thread(target=read, daemon=True).start()
    quiet_libraries()
    handler = QueueHandler(SimpleNamespace(put_nowait=partial(send, "log")))
    log = logging.getLogger("tailored_llama")
    log.setLevel(logging.INFO)

    def tell(done: int, total: int) -> None:
        send("progress", (done, total))

    while True:
        function, rank, arguments = inbox.get()
        log.handlers[:] = [] if rank else [handler]
        try:
            result = function(rank, silent if rank else tell, *arguments)
        except BaseException as error:  # a library in Rust panics with one that is no Exception
            error.add_note(traceback.format_exc())
            try:
                send("error", copy(error))  # made anew from its arguments, as on the other side
            except Exception:  # it takes other arguments than it keeps
                send("error", RuntimeError(f"{type(error).__name__}: {error}"))
        else:
            send("result", None if rank else result)
