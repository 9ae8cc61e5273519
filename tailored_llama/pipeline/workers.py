"""Stages side by side on this machine (`execution.processes`), in worker processes that stay warm."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from queue import Empty, LifoQueue
from threading import Lock
from typing import Any

from tailored_llama import models
from tailored_llama.config import Work
from tailored_llama.memory import free_caches, peak_memory, reset_peak_memory
from tailored_llama.pipeline.graph import Facts, Node, run_stage
from tailored_llama.processes import LOOK, Worker, call_in, holding
from tailored_llama.progress import Progress, silent

Slots = list[Worker | None]  # None: a worker that is started when it is needed


class Workers:
    """So many workers, each of which makes one stage at a time. One that was killed is replaced."""

    def __init__(self, count: int) -> None:
        self._count, self._turn = count, Lock()
        self._free: LifoQueue[Worker | None] = LifoQueue()  # a warm one comes first
        for _ in range(count):
            self._free.put(None)

    @contextmanager
    def held(self, alone: bool, check: Callable[[], None]) -> Iterator[Slots]:
        """Hold a worker; of what measures time (`alone`) all, and while it waits for them, no other stage begins.

        `check` is called a few times a second meanwhile; what it raises ends the wait.
        """
        slots = Slots()
        try:
            with holding(self._turn, check):
                while len(slots) < (self._count if alone else 1):
                    with suppress(Empty):
                        slots.append(self._free.get(timeout=LOOK))
                    check()
            yield slots
        finally:
            for worker in reversed(slots):  # the warm one last, so that it is taken first
                self._free.put(worker)


def run_in(slots: Slots, node: Node, work: Work, check: Callable[[], None]) -> Facts:
    """Make a node of folders in the first worker that is held, with its part of the CPU's threads.

    Raises:
        Exception: what the stage raised, or `check`, which is called a few times a second.
        MemoryError: the worker was killed, as the kernel does when memory runs out.
    """
    worker, slots[0] = slots[0], None
    if worker and not worker.process.is_alive():
        worker.kill()
        worker = None
    worker = worker or Worker()
    arguments = (node.stage.name, node.inputs, node.settings, replace(work, progress=silent))
    facts: Facts = call_in(worker, _run, arguments, work.progress, check, f"{node.name}: ")
    slots[0] = worker
    return facts


@cache
def workers(count: int) -> Workers:
    """The workers of this process, which all its runs share."""
    return Workers(count)


def _run(progress: Progress, name: str, inputs: Any, settings: Any, work: Work) -> dict[str, Any]:
    """In a worker: run the stage with a part of the threads."""
    import torch

    from tailored_llama.pipeline.stages import STAGES

    stage, threads = STAGES[name], torch.get_num_threads()
    reset_peak_memory()
    with models.using_threads(threads if stage.timed else max(1, threads // work.execution.processes)):
        facts = run_stage(stage, inputs, settings, replace(work, progress=progress))
    peak = peak_memory()
    free_caches()
    return {**(facts or {}), "peak_memory_bytes": peak}
