"""One stage at a time on a device, over all processes of a machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tailored_llama.config import ExecutionConfig
from tailored_llama.files import file_lock
from tailored_llama.models import pick_device

log = logging.getLogger(__name__)


@contextmanager
def device_slot(execution: ExecutionConfig, downloads: str) -> Iterator[None]:
    """Have the run's device alone, where the configuration asks for that.

    It is a file lock: the kernel frees it when its process dies, and no server has to be asked. A GPU is known by its
    UUID, so that processes which see different ones under the same number do not wait for each other.

    Args:
        execution: device, and who has it alone.
        downloads: the folder that holds the locks; only runs that share it wait for each other.

    Raises:
        InputError: a device is asked for that is not there.
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
