"""The dense model tuned on the same shots, and the rivals beside it: rows that appear on request and cost no other."""

from pathlib import Path
from typing import Any

import pytest

from compositions import built, compose, compose_incomplete, fail, folders, kinds, read_sweep
from helpers import save_worded_llama
from tailored_llama import training
from tailored_llama.config import TUNED_DENSE, SweepConfig, read_config_data, validate_as, validate_config
from tailored_llama.evaluation import MEAN, read_recovery
from tailored_llama.models import read_config
from tailored_llama.reports import stored_table

SMALL = Path(__file__).parents[3] / "data" / "recovery-small.toml"


def with_dense(run: dict[str, Any], **tuning: Any) -> dict[str, Any]:
    return run | {"tuning": run["tuning"] | {"dense": True} | tuning}


def failing_on_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every tuning of a dense model fail."""
    error = RuntimeError("a shape is wrong")
    fail(monkeypatch, (training, "tune"), error, lambda call: call["pruned"].parent.name == "dense")


def test_the_tuned_dense_model_is_beside_the_others_on_request_and_changes_none_of_them(two: dict[str, Any]) -> None:
    config, root = validate_config(two), two["store"]["root"]
    plain = compose("tailor", config)
    before = built(root)
    assert "tuned on the same shots" not in (plain / "report.html").read_text()

    report = compose("tailor", validate_config(with_dense(two)))
    assert kinds(root, before) == ["adapter"] * 2 + ["report"] + ["scores"] * 2
    rows, sizes = read_recovery(report)
    assert ([row for row in rows if row.model != TUNED_DENSE], sizes) == read_recovery(plain)
    assert [row.benchmark for row in rows if row.model == TUNED_DENSE and row.accuracy] == ["colours", "shades", MEAN]
    for text in (*((report / page).read_text() for page in ("report.html", "report.md")), stored_table(report).caption):
        assert "Dense, tuned on the same shots: colours " in str(text)
    assert "dense, tuned adapters shades" in (report / "report.html").read_text()  # among the costs

    again = built(root)
    assert compose("tailor", config) == plain
    assert built(root) == again


def test_a_mixture_tunes_one_dense_adapter_too(two: dict[str, Any]) -> None:
    compose("tailor", validate_config(with_dense(two, examples="mixture")))
    assert kinds(two["store"]["root"]).count("adapter") == 2


def test_a_run_that_tunes_nothing_does_not_tune_the_dense_model(two: dict[str, Any]) -> None:
    compose("tailor", validate_config(with_dense(two, examples="none")))
    assert "adapter" not in kinds(two["store"]["root"])


def test_a_dense_tuning_that_fails_costs_no_other_row(two: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    failing_on_dense(monkeypatch)
    report, failed = compose_incomplete("tailor", validate_config(with_dense(two)))
    assert set(failed) == {"tune colours @ 0.00", "tune shades @ 0.00"}
    scored = {(row.model, row.benchmark) for row in read_recovery(report)[0]}
    assert {("tailored", "colours"), ("tailored", "shades")} <= scored
    assert "Incomplete: tune colours @ 0.00 failed: a shape is wrong" in (report / "report.md").read_text()


def test_a_sweep_has_a_tuned_dense_row_for_each_tuning_over_the_seeds_of_its_cells(own_run: dict[str, Any]) -> None:
    grid = [
        {"tuning.shots": [4, 8], "seed": [0, 1]},
        {"tuning.examples": ["none"], "pruning.criterion": ["random"]},
        {"tuning.shots": [8], "pruning.criterion": ["magnitude_l2"]},
    ]
    asked = with_dense(own_run) | {"grid": grid, "tailored": True}
    config = validate_as(SweepConfig, asked)
    dense, fewer, more, *cells = read_sweep(compose("sweep", config))
    assert [(row.label, row.seeds) for row in (dense, fewer, more)] == [
        ("dense", 1),
        ("dense, tuned, shots=4", 2),
        ("dense, tuned, shots=8", 2),
    ]
    assert (more.ratio, more.removed, more.times_dense) == (0, 0, 1)
    assert more.recovery is not None
    assert not any(row.error for row in cells)
    plain = validate_as(SweepConfig, own_run | {"grid": grid, "tailored": True})
    before = built(config.store.root)
    assert read_sweep(compose("sweep", plain)) == [dense, *cells]
    assert kinds(config.store.root, before) == ["sweep"]


def test_a_dense_tuning_that_fails_costs_no_cell(own_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    failing_on_dense(monkeypatch)
    grid = [{"pruning.criterion": ["random"]}]
    config = validate_as(SweepConfig, with_dense(own_run) | {"grid": grid, "tailored": True})
    rows = read_sweep(compose_incomplete("sweep", config)[0])
    assert [(row.label, row.error) for row in rows] == [
        ("dense", None), (TUNED_DENSE, "a shape is wrong"), ("random", None),
    ]  # fmt: skip


def test_the_rows_of_the_short_recovery_study_on_a_tiny_model(own_run: dict[str, Any], tmp_path: Path) -> None:
    shipped = read_config_data(SMALL, [])
    own_run["model"] = {"source": str(save_worded_llama(tmp_path / "worded")), "dtype": "float32"}
    asked = {"grid": shipped["grid"], "labels": shipped["labels"], "tailored": shipped["tailored"]}
    config = validate_as(SweepConfig, with_dense(own_run, dense=shipped["tuning"]["dense"]) | asked)
    _, *rows = read_sweep(compose("sweep", config))
    assert [(row.label, row.ratio, row.error) for row in rows] == [
        (TUNED_DENSE, 0, None),
        *((label, 0.2, None) for label in shipped["labels"]),
    ]
    assert all(row.recovery is not None for row in rows)
    assert all(abs(row.removed - 0.2) < 0.05 for row in rows[1:])
    checkpoints = [read_config(path) for path in folders(config.store.root, "pruned")]
    assert min(found["vocab_size"] for found in checkpoints) < 704
