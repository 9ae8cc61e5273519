"""Which device a stage gets, on a machine with two GPUs that are only said to be there."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tailored_llama.config import ExecutionConfig
from tailored_llama.errors import InputError
from tailored_llama.models import device_slot, devices_of


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the GPUs that were made current, one after another."""
    made: list[int] = []

    @contextmanager
    def device(number: int) -> Iterator[None]:
        made.append(number)
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}"))
    monkeypatch.setattr(torch.cuda, "device", device)
    return made


def test_cuda_is_the_first_free_gpu_and_a_third_stage_waits(current: list[int], tmp_path: Path) -> None:
    execution = ExecutionConfig(device="cuda")
    with device_slot(execution, str(tmp_path)), ExitStack() as second:
        second.enter_context(device_slot(execution, str(tmp_path)))
        assert current == [0, 1]
        begun = threading.Event()

        def third() -> None:
            with device_slot(execution, str(tmp_path)):
                begun.set()

        waiting = threading.Thread(target=third)
        waiting.start()
        assert not begun.wait(0.2)
        second.close()
        assert begun.wait(30)
        waiting.join()
    assert current == [0, 1, 1]


def test_a_gpu_with_a_number_is_that_one(current: list[int], tmp_path: Path) -> None:
    for device in ("cuda:1", "cuda:0"):
        with device_slot(ExecutionConfig(device=device), str(tmp_path)):
            pass
    assert current == [1, 0]


def test_balanced_waits_for_all_gpus(current: list[int], tmp_path: Path) -> None:
    one, every = (ExecutionConfig(device=device) for device in ("cuda", "balanced"))
    begun = threading.Event()

    def spread() -> None:
        with device_slot(every, str(tmp_path)):
            begun.set()

    with device_slot(one, str(tmp_path)):
        waiting = threading.Thread(target=spread)
        waiting.start()
        assert not begun.wait(0.2)
    assert begun.wait(30)
    waiting.join()
    assert current == [0, 0]


def test_balanced_needs_two_gpus(current: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of("balanced") == ["cuda:0", "cuda:1"]
    assert devices_of("cuda") == ["cuda"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = "execution.device: got 'balanced'; allowed here: auto, cpu, or cuda:0 to cuda:0"
    with pytest.raises(InputError, match=f"^{message}$"):
        devices_of("balanced")


def test_a_gpu_that_is_shared_is_not_looked_for(current: list[int], tmp_path: Path) -> None:
    with device_slot(ExecutionConfig(device="cuda", exclusive="never"), str(tmp_path)):
        assert current == []
