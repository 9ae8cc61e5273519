"""Stages side by side on this machine (`execution.processes`): each in a process of its own, a few at a time."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from threading import Lock, Semaphore
from typing import Any

from tailored_llama.config import Work
from tailored_llama.memory import peak_memory
from tailored_llama.pipeline.stage import Facts, Stage, run_stage
from tailored_llama.processes import Killed, run_processes
from tailored_llama.progress import Progress, silent


class Slots:
    """So many stages at a time."""

    def __init__(self, count: int) -> None:
        self._count, self._free, self._turn = count, Semaphore(count), Lock()
        self._keys: defaultdict[str, Lock] = defaultdict(Lock)

    @contextmanager
    def held(self, key: str, is_built: Callable[[], bool], alone: bool) -> Iterator[bool]:
        """Hold a slot while an artifact is built; False, without a slot, if it was built meanwhile.

        A second call of the same artifact waits without a slot. A stage that measures time holds all slots (`alone`);
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


@cache
def slots(count: int) -> Slots:
    """The slots of this process, which all its runs share."""
    return Slots(count)


def run_beside(
    stage: Stage[Any], inputs: Mapping[str, Any], settings: Any, work: Work, check: Callable[[], None]
) -> Facts:
    """Run a stage on the folders of its inputs in a process of its own, with its part of the CPU's threads.

    Raises:
        Exception: what the stage raised, or `check`, which is called a few times a second.
        MemoryError: the process was killed, as the kernel does when memory runs out.
    """
    arguments = (stage.name, inputs, settings, replace(work, progress=silent))
    try:
        return run_processes(_run, arguments, work.progress, check=check)
    except Killed as error:
        raise MemoryError(f"{work.name}: {error}, perhaps because memory ran out") from None


def _run(rank: int, progress: Progress, name: str, inputs: Any, settings: Any, work: Work) -> dict[str, Any]:
    """In the new process: run the stage with a part of the threads."""
    import torch

    from tailored_llama.pipeline.stages import STAGES

    def name_stage(record: logging.LogRecord) -> bool:
        record.msg, record.args = f"{work.name.rpartition(' ')[0]}: {record.getMessage()}", ()
        return True

    for handler in logging.getLogger("tailored_llama").handlers:  # several stages log at once
        handler.addFilter(name_stage)
    stage, threads = STAGES[name], torch.get_num_threads()
    torch.set_num_threads(threads if stage.timed else max(1, threads // work.execution.processes))
    facts = run_stage(stage, inputs, settings, replace(work, progress=progress))
    return {**(facts or {}), "peak_memory_bytes": peak_memory()}
