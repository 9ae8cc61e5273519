"""A sweep on a tiny model: its rows, what it finds again, and cells that fail alone."""

import re
from pathlib import Path
from typing import Any

import pytest

from compositions import built, compose, compose_incomplete, fail, kinds, read_sweep, run_command
from helpers import as_toml, save_tiny_llama
from tailored_llama import models, pruning
from tailored_llama.config import SweepConfig, build_config
from tailored_llama.evaluation import SweepRow


@pytest.fixture
def config(own_run: dict[str, Any]) -> SweepConfig:
    grid = [{"pruning.criterion": ["magnitude_l2", "random"], "pruning.ratios": [0.1, 0.2]}]
    return build_config(SweepConfig, own_run | {"grid": grid})


def rows_of(config: SweepConfig) -> list[SweepRow]:
    return read_sweep(compose("sweep", config))


def rows_of_incomplete(config: SweepConfig) -> list[SweepRow]:
    return read_sweep(compose_incomplete("sweep", config)[0])


def test_a_cell_that_fails_is_in_the_table_and_alone_is_computed_again(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("CUDA out of memory")
    with monkeypatch.context() as broken:
        fail(broken, (pruning, "prune_model"), error, lambda call: call["settings"].ratio == 0.2)
        dense, *cells = rows_of_incomplete(config)
    assert (dense.label, dense.parameters is not None) == ("dense", True)
    assert [(row.label, row.ratio, row.error) for row in cells] == [
        ("magnitude_l2", 0.1, None), ("magnitude_l2", 0.2, "CUDA out of memory"),
        ("random", 0.1, None), ("random", 0.2, "CUDA out of memory"),
    ]  # fmt: skip
    before = built(config.store.root)

    assert not any(row.error for row in rows_of(config))
    assert kinds(config.store.root, before) == ["perplexity"] * 2 + ["pruned"] * 2 + ["scores"] * 2 + ["sweep"]

    after = built(config.store.root)
    rows_of(config)
    assert built(config.store.root) == after


def test_cells_are_tuned_as_they_say_and_seeds_share_a_row(own_run: dict[str, Any]) -> None:
    grid = [{"tuning.examples": ["none", "benchmark"], "seed": [0, 1]}, {"prompts.template": ["task"]}]
    config = build_config(SweepConfig, own_run | {"grid": grid, "tailored": True})
    dense, untuned, tuned, worded = rows_of(config)
    assert [row.seeds for row in (untuned, tuned, worded)] == [2, 2, 1]
    assert not any(row.error for row in (untuned, tuned, worded))
    assert all(row.recovery is not None for row in (untuned, tuned, worded))
    assert (dense.recovery, untuned.perplexity) == (1.0, tuned.perplexity)
    stages = kinds(config.store.root)
    assert (stages.count("adapter"), stages.count("pruned")) == (3, 2)


def test_models_of_two_sizes_and_one_that_cannot_be_loaded(
    own_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger, broken = tmp_path / "larger", tmp_path / "broken"
    save_tiny_llama(larger, num_hidden_layers=6)
    save_tiny_llama(broken, seed=1)
    grid = [{"model.source": [own_run["model"]["source"], str(larger), str(broken)]}]
    config = build_config(SweepConfig, own_run | {"grid": grid, "tailored": True})
    error = RuntimeError("CUDA out of memory")
    fail(monkeypatch, (models, "prepare_dense"), error, lambda call: call["settings"].source.name == str(broken))
    small, large, failed, *cells = rows_of_incomplete(config)
    assert (large.parameters or 0) > (small.parameters or 0)
    assert [cell.dense_parameters for cell in cells[:2]] == [small.parameters, large.parameters]
    assert [cell.dense_perplexity for cell in cells[:2]] == [small.perplexity, large.perplexity]
    assert all(cell.removed == pytest.approx(cell.ratio, abs=0.05) for cell in cells[:2])
    assert all(row.error and "CUDA out of memory" in row.error for row in (failed, cells[2]))


def test_the_command_prints_a_table_and_the_path_of_the_report(own_run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(as_toml(own_run) + '[[grid]]\n"pruning.criterion" = ["magnitude_l2"]\n')
    status, output, _ = run_command(path, "--set", "scored=false")
    assert status == 0
    assert re.search(r"magnitude_l2 +\d+\.\d / \d+\.\d", output)
    assert Path(output.strip().splitlines()[-1].removeprefix("report: ")).read_text().startswith("<!DOCTYPE html>")
    status, _, errors = run_command(path, "--set", "seed=-1")
    assert status == 2
    assert errors.startswith("error: seed: got -1; allowed: greater than or equal to 0")
