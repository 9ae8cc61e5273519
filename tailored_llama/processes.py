"""Work in other processes of this machine, which end with this one and whose messages arrive here."""

import logging
import os
import queue
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from logging.handlers import QueueHandler
from multiprocessing import parent_process
from threading import Thread, main_thread
from typing import Any

from tailored_llama.console import quiet_libraries
from tailored_llama.progress import Progress

_LOOK = 0.2  # seconds between two looks for messages


class Killed(RuntimeError):
    """Raised when a process was killed, by a person or because memory ran out."""


def check_main() -> None:
    """End the work of a thread whose program ends: Python would wait for its processes before it exits."""
    if not main_thread().is_alive():
        raise RuntimeError("the program has ended")


def forking() -> Any:
    """The context of processes that are forked from one which has imported what stages need, and has used no GPU."""
    from torch.multiprocessing import get_context  # late: seconds, which a run that finds everything need not wait

    context = get_context("forkserver")
    context.set_forkserver_preload(["tailored_llama.pipeline.forked"])
    return context


def run_processes(
    function: Callable[..., dict[str, Any]],
    arguments: tuple[Any, ...],
    progress: Progress,
    *,
    count: int = 1,
    check: Callable[[], None] = check_main,
) -> dict[str, Any]:
    """Run a function in new processes, and return what the first of them returned.

    Args:
        function: called with its rank, what reports progress, and `arguments`; all can be pickled.
        progress: called with the progress of the first process. Its log records are passed on, too.
        check: called a few times a second; what it raises ends the processes.

    Raises:
        Exception: the first that a process raised.
        Killed: a process was killed.
    """
    from torch.multiprocessing.spawn import ProcessException, start_processes  # late, as torch below

    messages = forking().Queue()
    returned: list[dict[str, Any]] = []
    errors: list[Exception] = []

    def listen() -> None:
        """Pass on what was reported, after waiting a little for the first report."""
        wait = _LOOK
        with suppress(queue.Empty):
            while True:
                message = messages.get(timeout=wait)
                wait = 0.0
                if isinstance(message, Exception):
                    errors.append(message)
                elif isinstance(message, logging.LogRecord):
                    if (log := logging.getLogger(message.name)).isEnabledFor(message.levelno):
                        log.handle(message)
                elif isinstance(message, dict):
                    returned.append(message)
                else:
                    progress(*message)

    started = (_member, (function, arguments, messages), count)
    members: Any = start_processes(*started, join=False, start_method="forkserver")
    try:
        while not members.join(timeout=0):
            listen()
            check()
        listen()
    except ProcessException as ended:
        listen()
        killed = [n for n, member in enumerate(members.processes) if member.exitcode == -signal.SIGKILL]
        if killed:
            raise Killed(f"process {killed[0]} was killed") from None
        raise (errors[0] if errors else RuntimeError(ended.msg.strip())) from None  # others only follow from the first
    finally:
        for member in members.processes:
            member.kill()
            member.join()
    if not returned:
        raise RuntimeError("a process ended without a result")
    return returned[0]


def _end_with_parent() -> None:
    """End this process once that which started it has ended, in whatever way; else it would work on for nobody."""
    if parent := parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _member(rank: int, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], messages: Any) -> None:
    """One of the processes; what the first one reports is passed on."""
    Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()
    if not rank:
        log = logging.getLogger("tailored_llama")
        log.addHandler(QueueHandler(messages))
        log.setLevel(logging.INFO)
    try:
        result = function(rank, lambda done, total: rank or messages.put((done, total)), *arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())
        try:
            messages.put(copy(error))  # made anew from its arguments, as on the other side
        except Exception:  # it takes other arguments than it keeps
            messages.put(RuntimeError(f"{type(error).__name__}: {error}"))
        raise
    if not rank:
        messages.put(result)
