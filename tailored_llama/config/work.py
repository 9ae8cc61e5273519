"""How a stage does its work: all that cannot change the bytes it writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tailored_llama.config.execution import ExecutionConfig, StoreConfig
from tailored_llama.progress import Progress, silent


@dataclass(frozen=True)
class Work:
    """Where a stage writes, and with what means.

    Args:
        out: an existing empty folder for its files.
        execution: device, batch size, and what is streamed.
        downloads: folder of fetched wheels.
        progress: called after every unit of work.
        resume: folder for the state of a long training, to continue from after a kill; None: nothing is kept.
        name: what the stage's logs are named after, such as `tune arc_easy @ 0.20`.
        halvings: how often memory ran out before, in one of several processes that train together; each time, the
            tokens of a pass are halved.
    """

    out: Path
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    downloads: str = StoreConfig.model_fields["downloads"].default
    progress: Progress = silent
    resume: Path | None = None
    name: str = "training"
    halvings: int = 0
