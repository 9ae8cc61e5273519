"""Stages that do not read one another run side by side on workers; a failure stops what reads it and nothing else."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from compositions import built, fail, read_sweep
from flows.compositions import sweep, tailor
from helpers import add_merge, save_tiny_llama
from services import ROOT
from tailored_llama import evaluation
from tailored_llama.config import ExecutionConfig, SweepConfig, build_config, validate_config
from tailored_llama.errors import InputError
from tailored_llama.evaluation import read_recovery
from tailored_llama.pipeline import IncompleteRun, Node, steps
from tailored_llama.preflight import preflight_tailor
from tasks import executor
from tasks.executor import open_store

DISPATCH = {"execution": {"device": "cpu", "dispatch": "pool"}}
Workers = Callable[..., Any]


@pytest.fixture
def two(own_run: dict[str, Any]) -> dict[str, Any]:
    """A run on two benchmarks."""
    return own_run | {"benchmarks": [*own_run["benchmarks"], {**own_run["benchmarks"][0], "name": "shades"}]}


def test_workers_make_what_the_flow_itself_makes(
    two: dict[str, Any], workers: Workers, tmp_path: Path, states: dict[str, list[str]]
) -> None:
    two["model"] = {"source": str(add_merge(save_tiny_llama(tmp_path / "model"))), "dtype": "float32"}
    two["store"] |= {"export": str(tmp_path / "exported"), "export_formats": ["gguf:f32"]}
    names = workers()
    report = tailor(validate_config(two | DISPATCH))
    assert len(names) == len(set(names))
    on_device = {"importance", "pruned", "adapter", "perplexity"}
    on_device |= {"scores", "quantised-scores", "gguf"}
    before = built(two["store"]["root"])
    assert len(names) == sum(path.parent.name in on_device for path in before)
    assert {name for name, seen in states.items() if "Dispatched" in seen} == set(names)
    assert states["report"] == ["Completed"]
    states.clear()
    assert tailor(validate_config(two)) == report
    assert {name for seen in states.values() for name in seen} == {"Cached"}
    assert built(two["store"]["root"]) == before


def test_all_that_can_begin_is_under_way_at_once(two: dict[str, Any], workers: Workers) -> None:
    first = {"importance taylor_gate", "perplexity dense", "score colours dense", "score shades dense"}
    then = {f"{what} @ 0.20" for what in ("score colours pruned", "score shades pruned", "perplexity pruned")}
    then |= {"tune colours @ 0.20", "tune shades @ 0.20"}
    together = {name: barrier for group in (first, then) for barrier in [Barrier(len(group))] for name in group}

    def meet(name: str) -> None:
        if name in together:
            together[name].wait(60)

    names = workers(meet)
    tailor(validate_config(two | DISPATCH))
    assert set(names) == first | then | {"prune @ 0.20"} | {f"score {n} tailored @ 0.20" for n in ("colours", "shades")}


def test_more_scores_than_workers_are_shared_out_among_as_many_runs(
    two: dict[str, Any], workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails stops no other."""
    two["benchmarks"] = [*two["benchmarks"], {**two["benchmarks"][0], "name": "tints"}]
    two["tuning"] |= {"examples": "none"}
    error = RuntimeError("a shape is wrong")
    names = workers(at_once=2)
    with monkeypatch.context() as broken:
        fail(broken, (evaluation, "score_benchmark"), error, lambda call: call["settings"].benchmark == "shades")
        with pytest.raises(IncompleteRun, match="score shades dense: a shape is wrong") as ended:
            tailor(validate_config(two | DISPATCH))
    assert set(ended.value.failed) == {"score shades dense", "score shades pruned @ 0.20"}
    shared = [name for name in names.runs if name.startswith("score")]
    assert sorted(shared) == [
        "score colours dense and 1 more", "score colours pruned @ 0.20 and 1 more",
        "score shades dense", "score shades pruned @ 0.20",
    ]  # fmt: skip
    before = built(two["store"]["root"])

    workers(at_once=1)
    report = tailor(validate_config(two | DISPATCH))
    after = built(two["store"]["root"])
    assert {path: after[path] for path in before} == before
    assert tailor(validate_config(two)) == report


def test_a_failed_stage_stops_what_reads_it_and_the_rest_is_reported(two: dict[str, Any], workers: Workers) -> None:
    def break_two(name: str) -> None:
        if name in ("tune shades @ 0.20", "perplexity dense"):
            raise RuntimeError("a shape is wrong")

    config = validate_config(two | DISPATCH)
    workers(break_two)
    with pytest.raises(IncompleteRun) as ended:
        tailor(config)
    assert set(ended.value.failed) == {"tune shades @ 0.20", "perplexity dense"}
    folder = open_store(config.store).open(ended.value.report)
    scored = {(row.model, row.benchmark) for row in read_recovery(folder)[0]}
    assert {("tailored", "colours"), ("pruned", "shades")} <= scored
    assert ("tailored", "shades") not in scored
    for page in ("report.md", "report.html"):
        text = (folder / page).read_text()
        assert "(incomplete)" in text
        assert "Incomplete: tune shades @ 0.20 failed: stage/pool: flow run tune shades @ 0.20, dense ended" in text
    before = built(two["store"]["root"])

    names = workers()
    whole = open_store(config.store).open(tailor(config))
    assert set(names) == {"tune shades @ 0.20", "score shades tailored @ 0.20", "perplexity dense"}
    assert "incomplete" not in (whole / "report.md").read_text()
    after = built(two["store"]["root"])
    assert {path: after[path] for path in before} == before


def test_a_dense_model_is_tuned_beside_the_others_and_fails_alone(two: dict[str, Any], workers: Workers) -> None:
    two["tuning"] |= {"dense": True}
    barrier = Barrier(3)
    together = dict.fromkeys(("tune colours @ 0.00", "tune shades @ 0.00", "importance taylor_gate"), barrier)

    def meet_or_fail(name: str) -> None:
        if name in together:
            together[name].wait(60)
        if name == "tune shades @ 0.00":
            raise RuntimeError("a shape is wrong")

    config = validate_config(two | DISPATCH)
    workers(meet_or_fail)
    with pytest.raises(IncompleteRun) as ended:
        tailor(config)
    assert set(ended.value.failed) == {"tune shades @ 0.00"}
    folder = open_store(config.store).open(ended.value.report)
    assert ("tailored", "shades") in {(row.model, row.benchmark) for row in read_recovery(folder)[0]}
    beside = {(row.model, row.benchmark) for row in read_recovery(folder)[0]}
    assert ("dense, tuned", "colours") in beside
    assert ("dense, tuned", "shades") not in beside
    before = built(two["store"]["root"])

    names = workers()
    tailor(config)
    assert set(names) == {"tune shades @ 0.00", "score shades dense, tuned"}
    after = built(two["store"]["root"])
    assert {path: after[path] for path in before} == before


def test_a_sweep_s_cells_wait_only_for_what_they_read(own_run: dict[str, Any], workers: Workers) -> None:
    grid = [
        {"prompts.template": ["task"], "tuning.examples": ["benchmark"]},
        {"pruning.criterion": ["magnitude_l2", "random"], "tuning.examples": ["none"]},
    ]
    config = build_config(SweepConfig, own_run | {"grid": grid, "tailored": True, "labels": ["a", "b"]})
    meet = Barrier(3)

    def wait(name: str) -> None:
        if name.startswith("importance"):
            meet.wait(60)
        if "b, random" in name:
            raise RuntimeError("CUDA out of memory")

    workers(wait)
    with pytest.raises(IncompleteRun, match=r"score colours b, random @ 0\.2: stage/pool: flow run") as ended:
        sweep(config.model_copy(update={"execution": validate_config(own_run | DISPATCH).execution}))
    folder = open_store(config.store).open(ended.value.report)
    assert "(incomplete)" in (folder / "sweep.md").read_text().splitlines()[0]
    rows = read_sweep(folder)
    assert [(row.label, bool(row.error)) for row in rows] == [
        ("dense", False),
        ("a", False),
        ("b, magnitude_l2", False),
        ("b, random", True),
    ]
    before = built(own_run["store"]["root"])
    again = read_sweep(open_store(config.store).open(sweep(config)))
    assert [row.accuracy for row in again[:3]] == [row.accuracy for row in rows[:3]]
    new = sorted(path.parent.name for path in built(own_run["store"]["root"]).keys() - before.keys())
    assert new == ["perplexity", "scores", "sweep"]


def test_a_process_for_one_stage_loads_nothing_that_only_others_need() -> None:
    script = """
import sys
from flows.compositions import stage
from tailored_llama.pipeline import STAGES
STAGES["scores"].load(), STAGES["pruned"].load()
print(*sorted({"bitsandbytes", "datasets", "matplotlib", "pandas", "peft", "torch_pruning"} & sys.modules.keys()))
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert printed.stdout.split() == []


def test_a_device_that_each_machine_would_choose_is_refused_before_any_work(own_run: dict[str, Any]) -> None:
    message = "execution.device: got 'auto'; allowed with execution.dispatch: cpu"
    with pytest.raises(InputError, match=message):
        preflight_tailor(validate_config(own_run | {"execution": {"dispatch": "gpu"}}))


def test_a_deployment_that_is_not_there_is_named(own_run: dict[str, Any]) -> None:
    config = validate_config(own_run | {"execution": {"dispatch": "nowhere", "device": "cpu"}})
    with pytest.raises(IncompleteRun, match="there is no deployment stage/nowhere") as ended:
        tailor(config)
    assert set(ended.value.failed) == {"importance taylor_gate", "score colours dense", "perplexity dense"}
    assert ended.value.report is None


def test_a_stage_that_is_ordered_again_takes_less_memory(
    own_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ordered = validate_config(own_run), list[ExecutionConfig]()

    def killed(node: Node, execution: ExecutionConfig) -> bool:
        ordered.append(execution)
        raise ConnectionError("the worker was killed")

    for tries in (1, 2, 3):
        monkeypatch.setattr(executor, "task_run", SimpleNamespace(run_count=tries))
        with pytest.raises(ConnectionError):
            executor.run_stage(steps.load_dense(config), config.store, config.execution, killed)
    assert [own.batch_tokens for own in ordered] == [None, 1024, 512]
    assert [own.recompute_activations for own in ordered] == [False, True, True]
