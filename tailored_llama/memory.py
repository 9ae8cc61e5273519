"""Memory: a stage's peak usage, and whether an error means that memory ran out."""

from __future__ import annotations

import contextlib
from pathlib import Path


def reset_peak_memory() -> None:
    """Reset the kernel's high-water mark of this process."""
    with contextlib.suppress(OSError):  # not Linux: the mark then covers the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident memory of the process since the last reset, in bytes; 0 if the kernel does not report it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU or the CPU ran out of memory."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    messages = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or should_reduce_batch_size(error)
        or any(text in str(error) for text in messages)
    )
