"""What other processes do in tests; they import this module, and little else."""

import logging
import sys
import time
from threading import Event, Thread
from typing import Any

from tailored_llama.processes import run_process
from tailored_llama.progress import Progress


class Refused(Exception):
    """An error that takes other arguments than it keeps, as some of libraries do."""

    def __init__(self, field: str, value: int) -> None:
        super().__init__(f"{field}: got {value}")


def refuse(progress: Progress) -> dict[str, Any]:
    logging.getLogger("tailored_llama.members").info("about to refuse")
    raise Refused("ratio", 2)


def begin_and_sleep(progress: Progress) -> dict[str, Any]:
    progress(1, 2)
    time.sleep(600)
    return {}


if __name__ == "__main__":  # a program that ends with an error while a thread of it waits for another process
    begun = Event()
    Thread(target=run_process, args=(begin_and_sleep, (), lambda done, total: begun.set()), daemon=True).start()
    begun.wait()
    sys.exit("ratio: got 2")
