"""Worker processes of this machine: they stay warm between two calls, and end with the process that started them.

`concurrent.futures` was tried with a pool for each process. A program that ends waits for every call that such a pool
has under way, and a pool's process outlives a program that is killed.
"""

import atexit
import logging
import os
import queue
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import cache, partial
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from threading import Lock, Thread, main_thread
from types import SimpleNamespace
from typing import Any

from tailored_llama.console import quiet_libraries
from tailored_llama.progress import Progress

LOOK = 0.2  # seconds between two calls of a check


def check_main() -> None:
    """End the work of a thread whose program ends: Python would wait for its processes before it exits."""
    if not main_thread().is_alive():
        raise RuntimeError("the program has ended")


@contextmanager
def holding(lock: Any, check: Callable[[], None]) -> Iterator[None]:
    """Hold a lock of threads; `check` is called a few times a second meanwhile, and what it raises ends the wait."""
    while not lock.acquire(timeout=LOOK):
        check()
    try:
        yield
    finally:
        lock.release()


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
    worker: Worker,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    progress: Progress,
    check: Callable[[], None],
    prefix: str = "",
) -> Any:
    """Call a function in a worker, which is killed if the call ends without its answer; returns what it returned.

    Args:
        worker: its log records are passed on.
        function: called with what reports progress, and `arguments`; all can be pickled.
        progress: called with the worker's progress.
        check: called a few times a second; what it raises ends the call.
        prefix: of its log, as several log at once.

    Raises:
        Exception: what the worker raised.
        MemoryError: it was killed, as the kernel does when memory runs out.
    """
    with suppress(BrokenPipeError):  # it is killed: the answer says so
        worker.connection.send((function, arguments))
    try:
        while True:
            if worker.connection.poll(LOOK):
                try:
                    kind, message = worker.connection.recv()
                except (EOFError, ConnectionError):  # it has ended without an answer
                    worker.process.join()
                    if (code := worker.process.exitcode) == -signal.SIGKILL:
                        raise MemoryError("the process was killed, perhaps because memory ran out") from None
                    raise RuntimeError(f"the process ended with {code}") from None
                if kind == "result":
                    return message
                if kind == "error":
                    raise message
                if kind == "progress":
                    progress(*message)
                elif (log := logging.getLogger(message.name)).isEnabledFor(message.levelno):
                    message.msg = f"{prefix}{message.msg}"
                    log.handle(message)
            check()
    except BaseException:  # it may be at work, or what failed has left memory behind, or a GPU that answers no more
        worker.kill()
        raise


def run_process(function: Callable[..., Any], arguments: tuple[Any, ...], progress: Progress) -> Any:
    """Call a function in a new process, as `call_in` does in a worker; returns what it returned."""
    worker = Worker()
    try:
        return call_in(worker, function, arguments, progress, check_main)
    finally:
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
        function, arguments = inbox.get()
        log.handlers[:] = [handler]
        try:
            result = function(tell, *arguments)
        except BaseException as error:  # a library in Rust panics with one that is no Exception
            error.add_note(traceback.format_exc())
            try:
                send("error", copy(error))  # made anew from its arguments, as on the other side
            except Exception:  # it takes other arguments than it keeps
                send("error", RuntimeError(f"{type(error).__name__}: {error}"))
        else:
            send("result", result)
