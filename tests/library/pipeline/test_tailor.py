"""The whole pipeline on a tiny model: what it computes, what it finds again, and what `tailored-llama run` shows."""

import json
from pathlib import Path
from typing import Any

import pytest

from compositions import built, compose, fail, folders, kinds, run_command
from helpers import as_toml, write_jsonl
from tailored_llama import training
from tailored_llama.config import validate_config


@pytest.fixture
def file(own_run: dict[str, Any], tmp_path: Path) -> Path:
    """The configuration as a file."""
    path = tmp_path / "nightly.toml"
    path.write_text(as_toml(own_run))
    return path


def test_a_second_run_does_no_work_and_a_changed_limit_scores_only(own_run: dict[str, Any]) -> None:
    own_run["pruning"]["ratios"] = [0.1, 0.3]
    config, root = validate_config(own_run), own_run["store"]["root"]
    first = compose("tailor", config)
    before = built(root)
    assert set(kinds(root)) == {
        "answers", "dense", "examples", "prompts", "groups", "reach", "calibration", "importance", "pruned", "adapter",
        "scores", "perplexity", "report",
    }  # fmt: skip

    assert compose("tailor", config) == first
    assert built(root) == before

    compose("tailor", validate_config(own_run | {"scoring": {"limit": 6}}))
    assert set(kinds(root, before)) == {"answers", "prompts", "scores", "report"}


def test_a_mixture_is_a_stage_of_its_own(own_run: dict[str, Any]) -> None:
    root = own_run["store"]["root"]
    compose("tailor", validate_config(own_run))

    def new(**changes: Any) -> list[str]:
        before = built(root)
        compose("tailor", validate_config(own_run | changes))
        return kinds(root, before)

    assert new() == []
    assert new(tuning=own_run["tuning"] | {"examples": "none"}) == ["report"]
    other = {**own_run["benchmarks"][0], "name": "shades"}
    mixed = new(benchmarks=[*own_run["benchmarks"], other], tuning=own_run["tuning"] | {"examples": "mixture"})
    assert mixed.count("adapter") == 1
    assert mixed.count("prompts") == 2  # of the new benchmark, to tune and to score: both are worded alike
    assert mixed.count("scores") == 4  # the new benchmark's dense and pruned, and both with the adapter


def test_a_failed_stage_is_retried_alone(own_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, root = validate_config(own_run), own_run["store"]["root"]
    with monkeypatch.context() as broken:
        fail(broken, (training, "tune"), RuntimeError("a shape is wrong"))
        with pytest.raises(RuntimeError, match="a shape is wrong"):
            compose("tailor", config)
    before = built(root)
    assert "pruned" in kinds(root)
    compose("tailor", config)
    assert kinds(root, before) == ["adapter", "report", "scores"]


def test_a_damaged_artifact_is_built_again_alone(own_run: dict[str, Any]) -> None:
    config, root = validate_config(own_run), own_run["store"]["root"]
    report = compose("tailor", config)
    before = built(root)
    (adapter,) = folders(root, "adapter")
    weights = adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert compose("tailor", config) == report
    after = built(root)
    assert {path.parent.name for path in after if after[path] != before[path]} == {"adapter"}


def test_the_command_prints_a_table_and_the_path_of_the_report(file: Path) -> None:
    status, output, _ = run_command(file, "--set", "tuning.epochs=1")
    assert status == 0
    assert "colours" in output
    report = Path(output.strip().splitlines()[-1].removeprefix("report: "))
    assert "<html" in report.read_text()[:200]
    assert (report.parent / "recovery.parquet").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruning.ratios=[1.5]", "error: pruning.ratios.0: got 1.5; allowed: less than 1"),
        ("pruning.ratios=[0.95]", "error: pruning.ratios: got 0.95; allowed: at most 0."),
        ("tuning.shots=100", "error: tuning.shots: got 100, beside 4 to hold out (tuning.held_out); allowed"),
        ('execution={device="cpu", dispatch="gpu"}', "error: execution.dispatch: got 'gpu'; allowed: a flow"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_clear_line(
    own_run: dict[str, Any], file: Path, override: str, message: str
) -> None:
    status, _, errors = run_command(file, "--set", override)
    assert status == 2
    assert errors.strip().splitlines()[-1].startswith(message)
    assert not {"importance", "pruned", "adapter", "scores"} & set(kinds(own_run["store"]["root"]))


@pytest.mark.parametrize("part", ["train", "evaluation"])
def test_an_answer_longer_than_the_context_is_refused_before_heavy_work(
    own_run: dict[str, Any], file: Path, part: str
) -> None:
    rows = Path(own_run["benchmarks"][0][part])
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[7]["options"] = ["red", "blue", "green", "so" * 200]
    write_jsonl(rows, lines)
    status, _, errors = run_command(file, "--set", "tuning.shots=20")  # with those held out, all
    assert status == 2
    assert errors.strip().splitlines()[-1] == (
        f"error: row 7: got an answer of 401 tokens, which begins with '{'so' * 20}'; allowed: at most 256, the "
        "model's context"
    )
    assert not {"importance", "pruned", "adapter", "scores"} & set(kinds(own_run["store"]["root"]))


def test_the_newest_report_lies_under_the_configuration_s_name_and_replaces_no_other_thing(
    file: Path, tmp_path: Path
) -> None:
    target = tmp_path / "reports" / "tailor-nightly"
    status, output, _ = run_command(file)
    assert status == 0
    assert f"report: {target / 'report.html'}" in output.splitlines()
    first = (target / "manifest.json").read_bytes()
    assert run_command(file, "--set", "scoring.limit=6")[0] == 0
    assert (target / "manifest.json").read_bytes() != first
    for copied in target.iterdir():
        copied.unlink()
    (target / "mine.txt").write_text("kept")
    status, _, errors = run_command(file, "--set", "scoring.limit=5")
    assert status == 2  # before any work
    assert f"store.reports: {target} is not a report; allowed: a new folder, or one to replace" in errors
    assert (target / "mine.txt").read_text() == "kept"


def test_a_report_that_cannot_be_copied_costs_a_warning_only(file: Path, tmp_path: Path) -> None:
    (tmp_path / "reports").touch()
    status, output, errors = run_command(file)
    assert status == 0
    assert "warning: the report was not copied: store.reports: " in errors
    assert f"report: {tmp_path / 'store' / 'report'}" in output
