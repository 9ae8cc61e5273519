"""Training in two processes on the CPU: as in one, resumed after a kill, and ended by the first error."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from helpers import tune
from members import run_out_then_refuse
from tailored_llama.config import ExecutionConfig, TuningConfig, Work
from tailored_llama.errors import InputError
from tailored_llama.training import processes

TOGETHER = ExecutionConfig(device="balanced", keep_state_every=2)


@pytest.fixture(autouse=True)
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "devices_of", lambda device: ["cpu", "cpu"])


def log_of(adapter: Path) -> dict[str, list[Any]]:
    return dict(pq.read_table(adapter / "log.parquet").to_pydict())


def test_two_processes_train_as_one_does_and_resume_after_a_kill(
    tiny: Path, prompts: Path, folder: Callable[[str], Path]
) -> None:
    # Of three samples a step, one process has two and the other one; some passes have no sample of their own.
    tuning = TuningConfig(epochs=2, learning_rate=2e-2, batch_size=3, micro_batch_tokens=96)
    one, two, state = folder("one"), folder("two"), folder("state")
    tune(tiny, prompts, tuning, one)

    def kill(done: int, total: int) -> None:
        if done == 4:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"training: process \d was killed"):
        tune(tiny, prompts, tuning, folder("killed"), execution=TOGETHER, progress=kill, resume=state)
    assert not multiprocessing.active_children()
    steps: list[int] = []
    tune(tiny, prompts, tuning, two, execution=TOGETHER, progress=lambda done, _: steps.append(done), resume=state)
    assert steps[0] in (3, 5)  # after a saved state; the kill may come late
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    for name, column in log_of(one).items():
        assert log_of(two)[name] == [None if value is None else pytest.approx(value, rel=1e-4) for value in column]
    expected, found = (load_file(out / "adapter_model.safetensors") for out in (one, two))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


def test_all_start_again_where_one_ran_out_of_memory_and_its_other_errors_end_them(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    work = Work(tmp_path, TOGETHER, progress=lambda done, total: told.append((done, total)))
    with pytest.raises(InputError, match="model: got one; allowed: another"):
        processes.in_processes(run_out_then_refuse, work)
    assert told == [(0, 2), (1, 2)]
    assert not multiprocessing.active_children()
