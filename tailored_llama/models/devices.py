"""Choosing a device, and locking it for one stage at a time across all processes of a machine."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tailored_llama.config import ExecutionConfig
from tailored_llama.errors import InputError
from tailored_llama.store import file_lock

log = logging.getLogger(__name__)


@contextmanager
def device_slot(execution: ExecutionConfig, downloads: str) -> Iterator[None]:
    """Hold the run's device exclusively, if the configuration asks for it.

    The slot is a file lock: the kernel frees it when its process dies, and no server is needed. A GPU is identified by
    its UUID, so processes that see different GPUs under the same number do not wait for each other.

    Args:
        execution: the device, and when it is exclusive.
        downloads: the folder that holds the locks; only runs that share it wait for each other.

    Raises:
        InputError: the device does not exist.
    """
    device = torch.device(pick_device(execution.device))
    if execution.exclusive == "never" or (execution.exclusive == "gpu" and device.type == "cpu"):
        yield
        return
    name = "cpu"
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        name = f"cuda-{torch.cuda.get_device_properties(index).uuid}"
    path = Path(downloads).expanduser() / ".slots" / name
    with file_lock(path, waiting=lambda: log.info("waiting for %s: another stage is at work on it", device)):
        yield


def pick_device(device: str) -> str:
    """Check a device name; `auto` becomes the first GPU if there is one, else the CPU.

    Raises:
        InputError: the device does not exist.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    cuda = re.fullmatch(r"cuda(?::(\d+))?", device)
    if device == "cpu" or (cuda and int(cuda[1] or 0) < count):
        return device
    allowed = f"auto, cpu, or cuda:0 to cuda:{count - 1}" if count else "auto or cpu (no CUDA device)"
    raise InputError(f"execution.device: got {device!r}; allowed here: {allowed}")
