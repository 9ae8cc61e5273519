"""What other processes do in tests; they import this module, and little else."""

import logging
import sys
import time
from threading import Event, Thread
from typing import Any

import torch
from torch import distributed

from tailored_llama.config import Work
from tailored_llama.errors import InputError
from tailored_llama.processes import run_processes
from tailored_llama.progress import Progress


def run_out_then_refuse(work: Work) -> dict[str, Any]:
    """The second process runs out of memory at first, then refuses its input; the first one waits for it."""
    if distributed.get_rank():
        work.progress(9, 9)  # of the first process alone is told
        raise InputError("model: got one; allowed: another") if work.halvings else torch.OutOfMemoryError("CUDA")
    work.progress(work.halvings, 2)
    distributed.barrier()
    return {}


class Refused(Exception):
    """An error that takes other arguments than it keeps, as some of libraries do."""

    def __init__(self, field: str, value: int) -> None:
        super().__init__(f"{field}: got {value}")


def refuse(rank: int, progress: Progress) -> dict[str, Any]:
    logging.getLogger("tailored_llama.members").info("about to refuse")
    raise Refused("ratio", 2)


def begin_and_sleep(rank: int, progress: Progress) -> dict[str, Any]:
    progress(1, 2)
    time.sleep(600)
    return {}


if __name__ == "__main__":  # a program that ends with an error while a thread of it waits for another process
    begun = Event()
    Thread(target=run_processes, args=(begin_and_sleep, (), lambda done, total: begun.set()), daemon=True).start()
    begun.wait()
    sys.exit("ratio: got 2")
