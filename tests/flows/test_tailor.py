"""The whole flow on a tiny model against a real (temporary) Prefect server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flows.tailor import tailor
from tasks._stage import open_store

from flows.__main__ import main
from helpers import as_toml
from services import ROOT
from tailored_llama.config import validate_config
from tailored_llama.evaluation import read_recovery


def stage_seconds(store: str) -> dict[Path, float]:
    """When each artifact's manifest was written: unchanged means not built again."""
    return {path: path.stat().st_mtime for path in Path(store).glob("*/*/manifest.json")}


def test_a_second_run_does_no_work_and_a_changed_limit_scores_only(own_run: dict[str, Any]) -> None:
    own_run["pruning"]["ratios"] = [0.1, 0.3]
    config = validate_config(own_run)
    first = tailor(config)
    built = stage_seconds(config.store.root)
    stages = {path.parent.parent.name for path in built}
    assert stages == {
        "dense", "examples", "prompts", "groups", "calibration", "importance", "pruned", "adapter", "scores",
        "perplexity", "report",
    }  # fmt: skip

    assert tailor(config) == first
    assert stage_seconds(config.store.root) == built

    tailor(validate_config(own_run | {"scoring": {"limit": 6}}))
    new = {path.parent.parent.name for path in stage_seconds(config.store.root).keys() - built.keys()}
    assert new == {"prompts", "scores", "report"}


def test_healing_distillation_and_a_mixture_are_stages_of_their_own(own_run: dict[str, Any]) -> None:
    own_run["healing"], own_run["distillation"] = {"tokens": 128}, {"weight": 1.0, "top": 8}
    folder = open_store(validate_config(own_run).store).open(tailor(validate_config(own_run)))
    perplexities = {model.model: model.perplexity for model in read_recovery(folder)[1]}
    assert perplexities["healed"] not in (None, perplexities["pruned"])
    built = stage_seconds(own_run["store"]["root"])
    taught = [path for path in built if path.parent.parent.name == "teacher"]
    assert len(taught) == 3  # the text for healing, that for tuning, and the shots
    assert {"healed", "adapter"} <= {path.parent.parent.name for path in built}

    def new(**changes: Any) -> list[str]:
        before = stage_seconds(own_run["store"]["root"])
        tailor(validate_config(own_run | changes))
        after = stage_seconds(own_run["store"]["root"])
        return sorted(path.parent.parent.name for path in after.keys() - before.keys())

    assert new() == []
    assert new(distillation={"weight": 2.0, "top": 8}) == ["adapter", "report", "scores"]
    assert new(tuning=own_run["tuning"] | {"examples": "none"}) == ["report", "scores"]
    other = {**own_run["benchmarks"][0], "name": "shades"}
    mixed = new(benchmarks=[*own_run["benchmarks"], other], tuning=own_run["tuning"] | {"examples": "mixture"})
    assert mixed.count("adapter") == 1
    assert mixed.count("scores") == 4  # the new benchmark's dense and pruned, and both with the adapter


def test_a_failed_stage_is_retried_alone(own_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = validate_config(own_run)
    import tasks.tune

    real = tasks.tune.tuning.tune

    def defect(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(tasks.tune.tuning, "tune", defect)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        tailor(config)
    before = stage_seconds(config.store.root)
    monkeypatch.setattr(tasks.tune.tuning, "tune", real)
    tailor(config)
    after = stage_seconds(config.store.root)
    assert {path: after[path] for path in before} == before
    assert {path.parent.parent.name for path in after.keys() - before.keys()} == {"adapter", "scores", "report"}


def test_a_damaged_artifact_is_built_again_alone(own_run: dict[str, Any]) -> None:
    config = validate_config(own_run)
    report = tailor(config)
    before = stage_seconds(config.store.root)
    (adapter,) = (Path(config.store.root) / "adapter").glob("*/adapter_model.safetensors")
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    open_store.cache_clear()  # as a new process would find it
    assert tailor(config) == report
    after = stage_seconds(config.store.root)
    assert {path.parent.parent.name for path in after if after[path] != before[path]} == {"adapter"}


def test_a_profile_that_fails_costs_no_report(own_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks.profile

    def out_of_memory(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(tasks.profile.profiling, "profile_checkpoint", out_of_memory)
    monkeypatch.setattr(tasks.profile.profile.task, "retry_delay_seconds", [0] * 3)
    config = validate_config(own_run | {"profile": {"batches": [1]}})
    folder = open_store(config.store).open(tailor(config))
    assert {model.prefill_speedup for model in read_recovery(folder)[1]} == {None}


def test_the_command_prints_a_table_and_the_path_of_the_report(
    own_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    work = {"batches": [1], "prompt_tokens": 8, "new_tokens": 2, "repeats": 1}
    path.write_text(as_toml(own_run | {"profile": work}))
    assert main(["tailor", str(path), "--set", "tuning.epochs=1"]) == 0
    output = capsys.readouterr().out
    assert "colours" in output
    assert "speed ×" in output
    report = Path(output.strip().splitlines()[-1].removeprefix("report: "))
    assert "<html" in report.read_text()[:200]
    assert (report.parent / "recovery.parquet").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruning.ratios=[1.5]", "error: pruning.ratios.0: got 1.5; allowed: less than 1"),
        ("pruning.ratios=[0.95]", "error: pruning.ratios: got 0.95; allowed: at most 0."),
        ("tuning.shots=100", "error: tuning.shots: got 100; allowed: at most 20 (colours has 24 train examples"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_clear_line(
    own_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(as_toml(own_run))
    assert main(["tailor", str(path), "--set", override]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(message)
    heavy = ("importance", "pruned", "adapter", "scores")
    assert not any((Path(own_run["store"]["root"]) / stage).exists() for stage in heavy)


def test_a_wrong_value_is_refused_before_prefect_and_torch_are_loaded() -> None:
    code = "import sys; from flows.__main__ import main; print(main(sys.argv[1:]), *sorted(sys.modules))"
    command = [sys.executable, "-c", code, "tailor", "data/quickstart.toml", "--set", "pruning.ratios=2"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stderr == "error: pruning.ratios: got 2; allowed: a list\n"
    status, *loaded = run.stdout.split()
    assert status == "2"
    assert "tailored_llama.config" in loaded
    assert not {"prefect", "torch", "transformers"} & set(loaded)


def test_the_newest_report_lies_under_the_configuration_s_name_and_replaces_no_other_thing(
    own_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nightly.toml"
    path.write_text(as_toml(own_run))
    target = tmp_path / "reports" / "nightly"
    assert main(["tailor", str(path)]) == 0
    assert f"report: {target / 'report.html'}" in capsys.readouterr().out.splitlines()
    first = (target / "manifest.json").read_bytes()
    assert main(["tailor", str(path), "--set", "scoring.limit=6"]) == 0
    assert (target / "manifest.json").read_bytes() != first
    for file in target.iterdir():
        file.unlink()
    (target / "mine.txt").write_text("kept")
    assert main(["tailor", str(path), "--set", "scoring.limit=5"]) == 2  # before any work
    assert (
        f"store.reports: {target} is not a report; allowed: a new folder, or one to replace" in capsys.readouterr().err
    )
    assert (target / "mine.txt").read_text() == "kept"


def test_a_report_that_cannot_be_copied_costs_a_warning_only(
    own_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reports").touch()
    path = tmp_path / "run.toml"
    path.write_text(as_toml(own_run))
    assert main(["tailor", str(path)]) == 0
    printed = capsys.readouterr()
    assert "warning: the report was not copied: store.reports: " in printed.err
    assert f"report: {tmp_path / 'store' / 'report'}" in printed.out
