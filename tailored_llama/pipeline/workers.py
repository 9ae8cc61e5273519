"""Stages side by side on this machine (`execution.processes`), in worker processes that stay warm."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from threading import Lock, Semaphore
from typing import Any

from tailored_llama.config import Work
from tailored_llama.memory import free_caches, peak_memory, reset_peak_memory
from tailored_llama.pipeline.graph import Facts, Stage, run_stage
from tailored_llama.processes import Killed, Worker, call_in
from tailored_llama.progress import Progress, silent


class Workers:
    """So many workers, each of which makes one stage at a time. One that was killed is replaced."""

    def __init__(self, count: int) -> None:
        self._count, self._free, self._turn = count, Semaphore(count), Lock()
        self._keys: defaultdict[str, Lock] = defaultdict(Lock)
        self._idle: list[Worker] = []

    @contextmanager
    def held(self, key: str, is_built: Callable[[], bool], alone: bool) -> Iterator[bool]:
        """Hold a worker while an artifact is built; False, without a worker, if it was built meanwhile.

        A second build of the same artifact waits without a worker. A stage that measures time holds all (`alone`);
        while it waits for them, no other stage begins.
        """
        with self._keys[key]:
            if is_built():
                yield False
                return
            wanted = self._count if alone else 1
            with self._turn:
                for _ in range(wanted):
                    self._free.acquire()
            try:
                yield True
            finally:
                self._free.release(wanted)

    def run(
        self, stage: Stage[Any], inputs: Mapping[str, Any], settings: Any, work: Work, check: Callable[[], None]
    ) -> Facts:
        """Run a stage on the folders of its inputs in a worker that is held, with its part of the CPU's threads.

        Raises:
            Exception: what the stage raised, or `check`, which is called a few times a second.
            MemoryError: the worker was killed, as the kernel does when memory runs out.
        """
        worker = self._idle_worker() or Worker()
        arguments = (stage.name, inputs, settings, replace(work, progress=silent))
        try:
            facts: Facts = call_in([worker], _run, arguments, work.progress, check)
        except BaseException as error:
            worker.kill()  # a stage that failed may leave memory behind, or a GPU that answers no more
            if isinstance(error, Killed):
                raise MemoryError(f"{work.name}: {error}, perhaps because memory ran out") from None
            raise
        self._idle.append(worker)
        return facts

    def _idle_worker(self) -> Worker | None:
        """A warm worker; one that was killed meanwhile is forgotten."""
        while self._idle:
            with suppress(IndexError):  # another thread was faster
                if (worker := self._idle.pop()).process.is_alive():
                    return worker
                worker.kill()
        return None


@cache
def workers(count: int) -> Workers:
    """The workers of this process, which all its runs share."""
    return Workers(count)


@cache
def _threads() -> int:
    """The threads of the CPU, before a stage takes a part of them."""
    import torch

    return torch.get_num_threads()


def _run(rank: int, progress: Progress, name: str, inputs: Any, settings: Any, work: Work) -> dict[str, Any]:
    """In a worker: run the stage with a part of the threads."""
    import torch

    from tailored_llama.pipeline.stages import STAGES

    def name_stage(record: logging.LogRecord) -> bool:
        record.msg, record.args = f"{work.name.rpartition(' ')[0]}: {record.getMessage()}", ()
        return True

    for handler in logging.getLogger("tailored_llama").handlers:  # several stages log at once
        handler.filters[:] = [name_stage]
    stage, threads = STAGES[name], _threads()
    torch.set_num_threads(threads if stage.timed else max(1, threads // work.execution.processes))
    reset_peak_memory()
    facts = run_stage(stage, inputs, settings, replace(work, progress=progress))
    peak = peak_memory()
    free_caches()
    return {**(facts or {}), "peak_memory_bytes": peak}
