"""A training in several processes, one on each GPU of the machine.

What each of them holds and computes is in `sharding.py`.
"""

from __future__ import annotations

import logging
import queue
import signal
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessException, start_processes

from tailored_llama.config import Work
from tailored_llama.console import quiet_libraries
from tailored_llama.memory import ran_out
from tailored_llama.models import devices_of
from tailored_llama.progress import silent

Train = Callable[[Work], dict[str, Any]]  # it can be pickled

_log = logging.getLogger(__name__)

HALVINGS = 5  # of the tokens a pass, before a training that runs out of memory is given up
_LOOK = 0.2  # seconds between two looks for messages


def in_processes(train: Train, work: Work) -> dict[str, Any]:
    """Run a training here, or with device `balanced` in one process on each GPU; returns what it measured.

    The processes end with this one. When memory runs out in one of them, all start again with half the tokens a pass,
    from the last saved state.

    Raises:
        Exception: the first that a process raised.
        RuntimeError: a process was killed.
    """
    if work.execution.device != "balanced":
        return train(work)
    devices = devices_of(work.execution.device)
    while True:
        try:
            return _run(train, work, devices)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error) or work.halvings == HALVINGS:
                raise
        work = replace(work, halvings=work.halvings + 1)
        _log.warning("memory ran out: starting again with 1/%d of the tokens a pass", 2**work.halvings)


def _run(train: Train, work: Work, devices: list[str]) -> dict[str, Any]:
    """One attempt: start the processes and pass on what they report."""
    messages = get_context("spawn").Queue()
    facts: dict[str, Any] = {}
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
                    logging.getLogger(message.name).handle(message)
                elif isinstance(message, dict):
                    facts.update(message)
                else:
                    work.progress(*message)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = (devices, Path(scratch), train, replace(work, progress=silent), messages)
        members: Any = start_processes(_member, arguments, nprocs=len(devices), join=False)
        try:
            while not members.join(timeout=0):
                listen()
        except ProcessException as ended:
            listen()
            killed = [n for n, member in enumerate(members.processes) if member.exitcode == -signal.SIGKILL]
            if killed or not errors:  # the errors of the others only follow from that
                why = f"process {killed[0]} was killed" if killed else ended.msg.strip()
                raise RuntimeError(f"training: {why}") from None
            raise errors[0] from None
        finally:
            for member in members.processes:
                member.kill()
                member.join()
        listen()
    if not facts:
        raise RuntimeError("training: its processes ended without a result")
    return facts


def _member(rank: int, devices: list[str], scratch: Path, train: Train, work: Work, messages: Any) -> None:
    """One of the processes. They all do the same; what the first one writes and reports is kept."""
    quiet_libraries()
    device = torch.device(devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))
    (out := scratch / str(rank)).mkdir()
    execution = work.execution.model_copy(update={"device": "cpu"})  # until the weights are shared out
    if rank:
        work = replace(work, out=out, execution=execution.model_copy(update={"log_to": "none"}))
    else:
        logging.getLogger("tailored_llama").addHandler(QueueHandler(messages))
        logging.getLogger("tailored_llama").setLevel(logging.INFO)
        work = replace(work, execution=execution, progress=lambda done, total: messages.put((done, total)))
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{scratch / 'meeting'}",
        rank=rank,
        world_size=len(devices),
    )
    try:
        facts = train(work)
    except Exception as error:
        error.add_note(traceback.format_exc())
        messages.put(error)
        raise
    if not rank:
        messages.put(facts)
    distributed.destroy_process_group()
