"""Stages side by side in processes of this machine: they make what one by one makes, and fail alone."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

import members
from compositions import built, compose, compose_incomplete
from services import ROOT, children, children_of, until
from tailored_llama.config import ExecutionConfig, StoreConfig, TextConfig, Work, validate_config
from tailored_llama.evaluation import PerplexitySettings, read_recovery
from tailored_llama.pipeline import Node, StoreExecutor, executor, steps
from tailored_llama.pipeline.graph import stage
from tailored_llama.pipeline.stages import STAGES
from tailored_llama.pipeline.workers import Slots, Workers, run_in
from tailored_llama.processes import run_process
from tailored_llama.progress import silent

SIDE_BY_SIDE = {"execution": {"processes": 2}}


def test_they_make_what_one_after_another_makes(two: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    config = validate_config(two)
    with caplog.at_level(logging.INFO):
        report = compose("tailor", validate_config(two | SIDE_BY_SIDE))
    assert any(line.startswith("tune shades @ 0.20: epoch 1 of 2") for line in caplog.messages)
    before = built(two["store"]["root"])
    assert compose("tailor", config) == report
    assert built(two["store"]["root"]) == before  # down to each key, which follows from the bytes of what was read
    one = two | {"store": {**two["store"], "root": two["store"]["root"] + "-one"}}
    again = compose("tailor", validate_config(one))
    assert {path.parent.name for path in before} == {path.parent.name for path in built(one["store"]["root"])}
    assert [row.accuracy for row in read_recovery(again)[0]] == [row.accuracy for row in read_recovery(report)[0]]


def test_a_failure_in_a_process_is_told_in_its_words_and_ends_what_reads_it_alone(two: dict[str, Any]) -> None:
    empty = Path(two["benchmarks"][0]["train"]).with_name("empty.txt")
    empty.touch()
    two["perplexity"] |= {"source": str(empty)}
    report, failed = compose_incomplete("tailor", validate_config(two | SIDE_BY_SIDE))
    assert failed.keys() == {"perplexity dense", "perplexity pruned @ 0.20"}
    assert str(failed["perplexity dense"]).endswith("empty.txt (a text): holds no text; allowed: at least one document")
    rows, _ = read_recovery(report)
    assert {row.benchmark for row in rows if row.model == "tailored"} == {"colours", "shades", "(mean)"}


def test_a_killed_worker_counts_as_out_of_memory_and_is_replaced(own_run: dict[str, Any], tmp_path: Path) -> None:
    config = validate_config(own_run | SIDE_BY_SIDE)
    run = StoreExecutor(config.store, config.execution)
    dense = run.open(steps.load_dense(config))
    settings = PerplexitySettings.of(config.perplexity)
    os.mkfifo(text := tmp_path / "text.txt")  # nobody writes into it: who reads it waits, until it is killed
    endless = replace(settings, text=replace(settings.text, kind="file", text=TextConfig(source=str(text))))
    begun, slots = Event(), Slots([None])

    def measure(settings: PerplexitySettings, check: Callable[[], None] = lambda: None) -> Mapping[str, Any] | None:
        (out := tmp_path / f"{len(list(tmp_path.iterdir()))}").mkdir()
        node = Node(STAGES["perplexity"], settings, {"checkpoint": dense}, "perplexity dense")
        return run_in(slots, node, Work(out, ExecutionConfig(processes=2)), check)

    def kill() -> None:
        begun.set()
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)

    with pytest.raises(MemoryError, match="the process was killed, perhaps because memory ran out"):
        measure(endless, kill)
    assert begun.is_set()
    until(lambda: not multiprocessing.active_children(), 20, "the end of all that were killed")
    assert measure(settings) is not None
    (warm,) = multiprocessing.active_children()
    assert measure(settings) is not None
    assert multiprocessing.active_children() == [warm]
    assert compose("tailor", config).is_dir()  # also with those that were idle when they were killed


def test_they_end_with_a_killed_run(tmp_path: Path) -> None:
    code = "import members; from tailored_llama.processes import run_process as run; "
    code += "run(members.begin_and_sleep, (), lambda done, total: None)"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    with children() as spawn:
        run = spawn([sys.executable, "-c", code], tmp_path / "log", {"PYTHONPATH": paths})
        server = until(lambda: children_of(run.pid, "forkserver"), 90, "a process from which others are forked")[0]
        stage = until(lambda: children_of(server), 90, "a stage under way")[0]
        run.kill()
        until(lambda: not Path(f"/proc/{stage}/cmdline").exists(), 20, "the end of the stage")


def test_a_program_that_ends_does_not_wait_for_them() -> None:
    command = [sys.executable, str(Path(members.__file__))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert (ended.returncode, ended.stderr.splitlines()[0]) == (1, "ratio: got 2")


def test_an_error_that_cannot_be_sent_is_told_in_words_and_a_log_as_its_reader_asks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for level, told in ((logging.WARNING, []), (logging.INFO, ["about to refuse"])):
        with caplog.at_level(level), pytest.raises(RuntimeError, match=r"^Refused: ratio: got 2$"):
            run_process(members.refuse, (), silent)
        assert caplog.messages == told


def test_what_measures_time_runs_alone() -> None:
    beside, order = Workers(2), list[str]()

    def begin(name: str, alone: bool = False) -> Thread:
        def hold() -> None:
            with beside.held(alone, lambda: None):
                order.append(name)

        thread = Thread(target=hold)
        thread.start()
        thread.join(0.1)
        return thread

    with beside.held(False, lambda: None):
        begin("beside")
        waiting = [begin("timed", alone=True), begin("after it")]
        assert order == ["beside"]
    for thread in waiting:
        thread.join()
    assert order == ["beside", "timed", "after it"]


def test_nothing_is_computed_beside_what_measures_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, begun, end = list[str](), Event(), Event()

    def measure(*_: Any) -> None:
        begun.set()
        assert end.wait(20)
        order.append("timed")

    def write(settings: None, work: Work) -> None:
        order.append("here")

    @stage("timed", 1, lambda: write, on_device=True, timed=True)
    def timed(*, settings: None = None) -> None: ...

    @stage("here", 1, lambda: write)
    def here(*, settings: None = None) -> None: ...

    monkeypatch.setattr(executor, "run_in", measure)
    run = StoreExecutor(StoreConfig(root=str(tmp_path)), ExecutionConfig(processes=2))
    run.begin(first := timed("timed"))
    assert begun.wait(20)
    run.begin(second := here("here"))
    time.sleep(0.2)
    assert len(list((tmp_path / ".building").iterdir())) == 1  # what waits has nothing in hand, and no seconds count
    end.set()
    assert (run.result(first).stage, run.result(second).stage) == ("timed", "here")
    assert order == ["timed", "here"]
