"""Training in two processes on the CPU: as in one, resumed after a kill, and ended by the first error."""

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

from helpers import CPU, tune
from members import run_out_then_refuse
from tailored_llama.config import ExecutionConfig, HealingConfig, TrainingConfig, TuningConfig, Work, narrow
from tailored_llama.data.calibration import CALIBRATION_SCHEMA
from tailored_llama.errors import InputError
from tailored_llama.store import write_table
from tailored_llama.training import HealSettings, TeachSettings, heal, processes, teach

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
    others = set(multiprocessing.active_children())  # warm workers of other tests

    def kill(done: int, total: int) -> None:
        if done == 4:
            child, *_ = set(multiprocessing.active_children()) - others
            os.kill(child.pid or 0, signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"process \d was killed"):
        tune(tiny, prompts, tuning, folder("killed"), execution=TOGETHER, progress=kill, resume=state)
    assert set(multiprocessing.active_children()) <= others
    steps: list[int] = []
    tune(tiny, prompts, tuning, two, execution=TOGETHER, progress=lambda done, _: steps.append(done), resume=state)
    assert steps[0] in (3, 5)  # after a saved state; the kill may come late
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    for name, column in log_of(one).items():
        assert log_of(two)[name] == [None if value is None else pytest.approx(value, rel=1e-4) for value in column]
    expected, found = (load_file(out / "adapter_model.safetensors") for out in (one, two))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


def test_two_processes_heal_all_weights_as_one_does(tiny: Path, folder: Callable[[str], Path]) -> None:
    text, teacher, one, two = folder("text"), folder("teacher"), folder("one"), folder("two")
    columns = {"input_ids": [[(3 * row + 7 * i) % 200 for i in range(24)] for row in range(6)], "row": range(6)}
    write_table(text / "calibration.parquet", columns | {"source": ["here"] * 6}, CALIBRATION_SCHEMA)
    teach(tiny, text, settings=TeachSettings(16), work=Work(teacher, CPU))
    healing = HealingConfig(batch_size=2, learning_rate=1e-3, precision="bfloat16")
    settings = HealSettings(narrow(healing, TrainingConfig), 0, full=True)
    for out, execution in ((one, CPU), (two, TOGETHER)):
        heal(tiny, teacher, settings=settings, work=Work(out, execution))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert log_of(two)["loss"] == [pytest.approx(loss, rel=2e-2, abs=2e-2) for loss in log_of(one)["loss"]]
    before, expected, found = (load_file(folder / "model.safetensors") for folder in (tiny, one, two))
    assert found.keys() == before.keys()
    assert all(not torch.equal(found[name], before[name]) for name in before)
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=1e-2)


def test_all_start_again_where_one_ran_out_of_memory_and_its_other_errors_end_them(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    others = set(multiprocessing.active_children())
    work = Work(tmp_path, TOGETHER, progress=lambda done, total: told.append((done, total)))
    with pytest.raises(InputError, match="model: got one; allowed: another"):
        processes.in_processes(run_out_then_refuse, work)
    assert told == [(0, 2), (1, 2)]
    assert set(multiprocessing.active_children()) <= others
