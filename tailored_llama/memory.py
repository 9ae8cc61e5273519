"""Memory: how much a stage took at most, and whether an error means that it ran out."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size


def reset_peak_memory() -> None:
    """Restart the kernel's high-water mark of this process."""
    with contextlib.suppress(OSError):  # not Linux: the mark is then the whole process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes of the process's resident high-water mark since the last reset (0 where the kernel does not say)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU or the CPU ran out of memory."""
    said = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or should_reduce_batch_size(error)
        or any(text in str(error) for text in said)
    )
