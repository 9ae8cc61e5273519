"""A training in several processes, one on each GPU of the machine.

What each of them holds and computes is in `sharding.py`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from tailored_llama.config import Work
from tailored_llama.memory import ran_out
from tailored_llama.models import devices_of
from tailored_llama.processes import run_processes
from tailored_llama.progress import Progress, silent

Train = Callable[[Work], dict[str, Any]]  # it can be pickled

_log = logging.getLogger(__name__)

HALVINGS = 5  # of the tokens a pass, before a training that runs out of memory is given up


def in_processes(train: Train, work: Work) -> dict[str, Any]:
    """Run a training here, or with device `balanced` in one process on each GPU; returns what it measured.

    The processes end with this one. When memory runs out in one of them, all start again with half the tokens a pass,
    from the last saved state.

    Raises:
        Exception: the first that a process raised.
        Killed: a process was killed.
    """
    if work.execution.device != "balanced":
        return train(work)
    devices = devices_of(work.execution.device)
    while True:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                arguments = (devices, Path(scratch), train, replace(work, progress=silent))
                return run_processes(_member, arguments, work.progress, count=len(devices))
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error) or work.halvings == HALVINGS:
                raise
        work = replace(work, halvings=work.halvings + 1)
        _log.warning("memory ran out: starting again with 1/%d of the tokens a pass", 2**work.halvings)


def _member(
    rank: int, progress: Progress, devices: list[str], scratch: Path, train: Train, work: Work
) -> dict[str, Any]:
    """One of the processes. They all do the same; what the first one writes and reports is kept."""
    device = torch.device(devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))
    (out := scratch / str(rank)).mkdir()
    update = {"device": "cpu"} | ({"log_to": "none"} if rank else {})  # until the weights are shared out
    execution = work.execution.model_copy(update=update)
    work = replace(work, out=out if rank else work.out, execution=execution, progress=progress)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{scratch / 'meeting'}",
        rank=rank,
        world_size=len(devices),
    )
    facts = train(work)
    distributed.destroy_process_group()
    return facts
