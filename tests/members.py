"""What processes that train together do in tests; they import this module, and little else."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from tailored_llama.config import Work
from tailored_llama.errors import InputError


def run_out_then_refuse(work: Work) -> dict[str, Any]:
    """The second process runs out of memory at first, then refuses its input; the first one waits for it."""
    if distributed.get_rank():
        work.progress(9, 9)  # of the first process alone is told
        raise InputError("model: got one; allowed: another") if work.halvings else torch.OutOfMemoryError("CUDA")
    work.progress(work.halvings, 2)
    distributed.barrier()
    return {}
