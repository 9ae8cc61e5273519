"""What is tried again by itself, and what is not; one stage at a time on a device."""

import logging
import multiprocessing
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import torch
from fsspec.implementations.memory import MemoryFileSystem
from prefect.states import Failed
from transformers import LlamaModel

from compositions import status_of
from flows.__main__ import app
from flows.compositions import tailor
from helpers import as_toml
from tailored_llama import training
from tailored_llama.config import ExecutionConfig, Work, validate_config
from tailored_llama.errors import InputError, UnreachableError, is_transient
from tailored_llama.models import device_slot
from tailored_llama.pipeline import IncompleteRun
from tasks import executor


def status(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "https://example.org")
    return httpx.HTTPStatusError("said so", request=request, response=httpx.Response(code, request=request))


PASSING = [
    ConnectionResetError("reset by peer"),
    httpx.ReadTimeout("no answer"),
    requests.ConnectionError("no route"),
    status(503),
    status(429),
    UnreachableError("the Hub does not answer"),
]
LASTING = [InputError("pruning.ratios: got 2"), FloatingPointError("loss is nan"), status(404), ValueError("no")]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_the_network_did_may_pass(error: Exception) -> None:
    assert is_transient(error)
    wrapped = OSError("cannot load the tokenizer")
    wrapped.__cause__ = error
    assert is_transient(wrapped)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_is_wrong_stays_wrong(error: Exception) -> None:
    assert not is_transient(error)


class Tries:
    """Fails as often as there are errors, then does the real work; keeps the execution settings it was given."""

    def __init__(self, real: Any, errors: list[Exception]) -> None:
        self.real, self.errors, self.seen = real, errors, list[ExecutionConfig]()

    def __call__(self, work: Work, **inputs: Any) -> Any:
        self.seen.append(work.execution)
        if self.errors:
            raise self.errors.pop(0)
        return self.real(work=work, **inputs)


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch, no_delay: None) -> Any:
    def install(*errors: Exception) -> Tries:
        made = Tries(training.tune, list(errors))
        monkeypatch.setattr(training, "tune", made)
        return made

    return install


def test_out_of_memory_is_tried_again_with_less(own_run: dict[str, Any], tries: Any) -> None:
    tuning = tries(torch.OutOfMemoryError("CUDA out of memory"), ConnectionResetError())
    tailor(validate_config(own_run))
    assert [seen.recompute_activations for seen in tuning.seen] == [False, True, True]


@pytest.mark.usefixtures("no_delay")
def test_a_device_with_too_little_memory_is_given_smaller_passes(
    own_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importance and reconstruction, whose 1,024 tokens fit into one pass, on a device that takes 512."""
    real, refused = LlamaModel.forward, list[int]()

    def forward(self: Any, input_ids: Any = None, *arguments: Any, **named: Any) -> Any:
        if input_ids is not None and input_ids.numel() > 512:
            refused.append(input_ids.numel())
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, input_ids, *arguments, **named)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    own_run["calibration"]["samples"] = 64
    tailor(validate_config(own_run))
    assert refused == [1024, 1024] * 2  # at once, and at 1,024 tokens a time; then 512


@pytest.mark.parametrize(("stage", "again"), [("adapter", True), ("calibration", False), ("speed", False)])
def test_where_nothing_can_take_less_memory_that_ran_out_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, stage: str, again: bool
) -> None:
    monkeypatch.setattr(executor, "get_run_logger", logging.getLogger)
    full = Failed(data=torch.OutOfMemoryError("CUDA out of memory"))
    assert executor._task(stage).retry_condition_fn(None, None, full) == again


@pytest.mark.parametrize("error", [FloatingPointError("training: loss is nan at step 3 of 10"), InputError("no")])
def test_what_will_not_pass_is_not_tried_again(
    own_run: dict[str, Any], tries: Any, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    tuning = tries(error)
    with pytest.raises(IncompleteRun, match=str(error)), caplog.at_level("ERROR", logger="prefect.task_runs"):
        tailor(validate_config(own_run))
    assert len(tuning.seen) == 1
    traced = [record for record in caplog.records if record.getMessage() == "another try would not help"]
    assert [record.exc_info and record.exc_info[1] for record in traced] == [error] * (type(error) is not InputError)


@pytest.mark.usefixtures("no_delay")
def test_a_store_that_stops_answering_is_asked_again_and_then_one_line(
    own_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, refused = MemoryFileSystem.put_file, list[str]()

    def put(self: Any, near: str, far: str, *arguments: Any, **named: Any) -> Any:
        if "/examples/" in far:
            refused.append(far)
            raise OSError("no route to host")
        return real(self, near, far, *arguments, **named)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    monkeypatch.setenv("HOME", str(tmp_path))  # where working copies are
    own_run["store"]["root"] = "memory://fails"
    (tmp_path / "run.toml").write_text(as_toml(own_run))
    assert status_of(app, ["tailor", str(tmp_path / "run.toml")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert re.fullmatch(
        r"error: store.root memory://fails: no route to host while pushing examples/\w+; nothing is lost, run it again",
        said[0],
    )
    assert len(refused) == 4


def hold(downloads: str, ready: Any) -> None:
    with device_slot(ExecutionConfig(device="cpu", exclusive="always"), downloads):
        ready.set()
        time.sleep(600)


def test_a_device_is_had_alone_until_its_holder_dies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    holder = spawn.Process(target=hold, args=(str(tmp_path), ready))
    holder.start()
    assert ready.wait(180)
    execution = ExecutionConfig(device="cpu", exclusive="always")
    with device_slot(ExecutionConfig(device="cpu"), str(tmp_path)):
        pass  # the CPU is shared, where nothing else is asked for

    def wait() -> None:
        with device_slot(execution, str(tmp_path)):
            pass

    from threading import Thread

    waiting = Thread(target=wait)
    with caplog.at_level("INFO", logger="tailored_llama.models.devices"):
        waiting.start()
        deadline = time.monotonic() + 30
        while "waiting for cpu" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert waiting.is_alive()
        assert "waiting for cpu: another stage is at work on it" in caplog.text
        holder.kill()
        waiting.join(30)
    assert not waiting.is_alive()
