"""Memory: a stage's peak usage, what is free, and whether an error means that memory ran out."""

import contextlib
import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path


def reset_peak_memory() -> None:
    """Reset the kernel's high-water mark of this process."""
    with contextlib.suppress(OSError):  # not Linux: the mark then covers the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident memory of the process since the last reset, in bytes; 0 if the kernel does not report it."""
    return _field("/proc/self/status", "VmHWM:") or 0


def free_caches() -> None:
    """Give back what a stage has left behind, for the next one in this process or for another process on the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Do not look for garbage while a library or a tokenizer is loaded: a search goes through a million objects."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def out_of_memory(error: Exception) -> bool:
    """Return whether an error says that a GPU or the CPU ran out of memory."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    messages = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or should_reduce_batch_size(error)
        or any(text in str(error) for text in messages)
    )


def free_memory(device: str = "cpu") -> int:
    """Bytes that this process can still take on a device; of a CPU's, no more than the container or RLIMIT_DATA leaves.

    Pages of mapped files do not count: the kernel drops them when memory is short.
    """
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    free += [size for size in (_field("/proc/meminfo", "MemAvailable:"), _left_in_cgroup()) if size is not None]
    limit, taken = resource.getrlimit(resource.RLIMIT_DATA)[0], _field("/proc/self/status", "VmData:")
    if limit != resource.RLIM_INFINITY and taken is not None:
        free.append(limit - taken)
    return max(0, min(free))


def _left_in_cgroup() -> int | None:
    """Return what the limit of a container leaves beside the memory of programs; None without such a limit."""
    with contextlib.suppress(OSError, ValueError):
        taken = _field("/sys/fs/cgroup/memory.stat", "anon", unit=1)
        return int(Path("/sys/fs/cgroup/memory.max").read_text()) - (taken or 0)
    return None


def _field(file: str, name: str, unit: int = 1024) -> int | None:
    """A number from a file of the kernel's with one name and number a line, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.split()[:1] == [name]:
                return int(line.split()[1]) * unit
    return None
