"""Logs that people watch while a training runs: TensorBoard, or Weights & Biases."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tailored_llama.config import Work

Log = Callable[[dict[str, Any], int], None]


@contextmanager
def step_log(work: Work, first: int) -> Iterator[Log]:
    """What logs the figures of a step as `execution.log_to` says, by accelerate's trackers; None is no figure.

    A training that is resumed at the step `first` goes on with the log of its name.
    """
    execution = work.execution
    if execution.log_to == "none":
        yield lambda figures, step: None
        return
    from accelerate.tracking import TensorBoardTracker, WandBTracker  # late: most trainings need none

    run = re.sub(r"[^\w.-]+", "-", work.name)
    if execution.log_to == "tensorboard":
        tracker: Any = TensorBoardTracker(run, execution.log_folder, purge_step=first)
    else:
        tracker = WandBTracker("tailored-llama", name=run, id=run, resume="allow", dir=execution.log_folder)
    tracker.start()
    try:
        yield lambda figures, step: tracker.log({k: v for k, v in figures.items() if v is not None}, step=step)
    finally:
        tracker.finish()
