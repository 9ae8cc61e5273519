"""Sweeps: which cells a grid makes, what is said of a bad one, and what the table and the page say of good ones."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compositions import read_sweep
from helpers import save_tiny_llama
from tailored_llama.config import SweepConfig, dense_runs, load_config, sweep_cells, tuned_dense_cells
from tailored_llama.errors import InputError
from tailored_llama.evaluation import MeasuredModel, RecoveryRow, SweepRow
from tailored_llama.evaluation.scores import PREDICTIONS_SCHEMA, metrics
from tailored_llama.evaluation.sweep import measure
from tailored_llama.models import read_structure
from tailored_llama.reports import stored_table
from tailored_llama.reports.sweep import write_sweep
from tailored_llama.store import read_rows, write_table

GRID = '[[grid]]\n"pruning.criterion" = ["magnitude_l2", "random"]\n"pruning.ratios" = [0.1, 0.2]\n'


def sweep_file(folder: Path, grid: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text('benchmarks = ["piqa"]\n[pruning]\nmin_kv_heads = 2\n' + grid)
    return path


def load_sweep(path: Path, overrides: list[str] | None = None) -> Any:
    return load_config(path, overrides, SweepConfig)


def test_a_table_makes_every_combination_and_tables_are_joined(tmp_path: Path) -> None:
    again = '[[grid]]\n"reconstruction.method" = ["none"]\n"pruning.ratios" = [0.2]\n' + GRID
    found = sweep_cells(load_sweep(sweep_file(tmp_path, GRID + again), ["scoring.limit=5"]))
    assert [(cell.label, *cell.run.pruning.ratios) for cell in found] == [
        ("magnitude_l2, static", 0.1), ("magnitude_l2, static", 0.2), ("random, static", 0.1), ("random, static", 0.2),
        ("taylor_gate, method=none", 0.2),
    ]  # fmt: skip
    assert [cell.run.pruning.criterion for cell in found] == [
        "magnitude_l2",
        "magnitude_l2",
        "random",
        "random",
        "taylor_gate",
    ]
    assert {(cell.run.pruning.min_kv_heads, cell.run.scoring.limit) for cell in found} == {(2, 5)}


def test_cells_that_differ_have_labels_that_differ(tmp_path: Path) -> None:
    channels, heads = ('[[grid]]\n"pruning.min_' + kind + '" = [1]\n' for kind in ("channels", "kv_heads"))
    labels = [cell.label for cell in sweep_cells(load_sweep(sweep_file(tmp_path, channels + heads)))]
    assert labels == ["min_channels=1, min_kv_heads=2", "min_channels=64, min_kv_heads=1"]


def test_ratios_of_the_run_are_cells_where_the_grid_names_none(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, '[[grid]]\n"pruning.criterion" = ["magnitude_l2"]\n')
    found = sweep_cells(load_sweep(path, ["pruning.ratios=[0.3, 0.4]"]))
    assert [cell.run.pruning.ratios for cell in found] == [(0.3,), (0.4,)]


def test_cells_that_differ_in_their_seed_only_have_one_label(tmp_path: Path) -> None:
    found = sweep_cells(
        load_sweep(sweep_file(tmp_path, '[[grid]]\n"pruning.criterion" = ["magnitude_l2"]\nseed = [3, 4]\n'))
    )
    assert [(cell.label, cell.run.seed) for cell in found] == [("magnitude_l2", 3), ("magnitude_l2", 4)]


def test_tables_may_have_names(tmp_path: Path) -> None:
    grid = GRID + '[[grid]]\n"pruning.criterion" = ["taylor_first"]\n"pruning.min_channels" = [2]\n'
    found = sweep_cells(load_sweep(sweep_file(tmp_path, grid), ['labels=["cheap", "norm"]']))
    assert [cell.label for cell in found] == [
        "cheap, magnitude_l2",
        "cheap, magnitude_l2",
        "cheap, random",
        "cheap, random",
        "norm",
    ]
    with pytest.raises(InputError, match=r"labels: got 1; allowed: 2, one for each table of the grid"):
        load_sweep(sweep_file(tmp_path, grid), ['labels=["cheap"]'])


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("", "grid: not set"),
        ("grid = []", "grid: got []; allowed: at least 1 item"),
        (
            '[[grid]]\n"pruning.criterion" = "magnitude_l2"',
            "grid.0.pruning.criterion: got 'magnitude_l2'; allowed: a list",
        ),
        (
            GRID + '"calibration.samples" = [0]',
            "grid, cell {'pruning.criterion': 'magnitude_l2', 'pruning.ratios': 0.1, 'calibration.samples': 0}: "
            "calibration.samples: got 0",
        ),
        (GRID + '"pruning.kind" = [["mlp"]]', "pruning.kind: unknown key; did you mean pruning.kinds?"),
        (GRID + '[[grid]]\n"pruning.criterion" = []', "grid.1.pruning.criterion: got []; allowed: at least 1 item"),
        (
            GRID + '"seed.foo" = [1]',
            "grid, cell {'pruning.criterion': 'magnitude_l2', 'pruning.ratios': 0.1, 'seed.foo': 1}: seed",
        ),
        (
            '[[grid]]\n"tuning.shots" = [10]',
            "grid: got 'tuning.shots', which changes nothing without tuning; allowed: with tailored = true",
        ),
        (
            GRID + '"scoring.limit" = [1]',
            "grid: got 'scoring.limit'; allowed: seed, and the fields of model, calibration, pruning, reconstruction, "
            "prompts, tuning",
        ),
    ],
)
def test_a_bad_grid_is_named(tmp_path: Path, grid: str, message: str) -> None:
    place = "benchmarks = ['piqa']\n" + grid
    (tmp_path / "sweep.toml").write_text(place)
    with pytest.raises(InputError, match=re.escape(message)):
        load_sweep(tmp_path / "sweep.toml")


def test_a_model_is_a_setting_with_a_dense_row_of_its_own(tmp_path: Path) -> None:
    grid = '[[grid]]\n"model.source" = ["a/small", "b/large"]\n"pruning.ratios" = [0.1, 0.2]\n'
    config = load_sweep(sweep_file(tmp_path, grid), ["prompts.template=generic"])
    found = sweep_cells(config)
    assert [(cell.label, cell.dense) for cell in found[1:3]] == [
        ("a/small", "dense, a/small"),
        ("b/large", "dense, b/large"),
    ]
    runs = dense_runs(config, found)
    assert {label: run.model.source for label, run in runs.items()} == {
        "dense, a/small": "a/small", "dense, b/large": "b/large",
    }  # fmt: skip
    assert {run.prompts.template for run in runs.values()} == {"generic"}
    one = load_sweep(sweep_file(tmp_path, GRID))
    assert dense_runs(one, sweep_cells(one)) == {"dense": one}


def test_the_dense_model_is_tuned_as_the_cells_are_and_once_for_each_tuning(tmp_path: Path) -> None:
    grid = (
        '[[grid]]\n"tuning.rank" = [4, 8]\n"pruning.criterion" = ["magnitude_l2", "random"]\nseed = [0, 1]\n'
        '[[grid]]\n"tuning.examples" = ["none"]\nseed = [2]\n'
        '[[grid]]\n"calibration.samples" = [64]\n"tuning.rank" = [8]\n'
    )
    asked = ["tailored=true", "tuning.dense=true"]

    def found(*changes: str) -> list[tuple[str, int]]:
        config = load_sweep(sweep_file(tmp_path, grid), [*asked, *changes])
        return [(cell.label, cell.run.seed) for cell in tuned_dense_cells(config, sweep_cells(config))]

    assert found() == [(f"dense, tuned, rank={rank}", seed) for rank in (4, 8) for seed in (0, 1)]
    assert found("tuning.dense=false") == []
    untuned = load_sweep(sweep_file(tmp_path, GRID), ["tuning.dense=true"])
    assert tuned_dense_cells(untuned, sweep_cells(untuned)) == []
    with pytest.raises(InputError, match=r"grid: got 'tuning.dense'; allowed: in the table \[tuning\]"):
        load_sweep(sweep_file(tmp_path, '[[grid]]\n"tuning.dense" = [true]\n'), ["tailored=true"])


def test_each_model_has_a_tuned_dense_row_of_its_own(tmp_path: Path) -> None:
    grid = '[[grid]]\n"model.source" = ["a/small", "b/large"]\n"pruning.ratios" = [0.1, 0.2]\n'
    config = load_sweep(sweep_file(tmp_path, grid), ["tailored=true", "tuning.dense=true"])
    tuned = tuned_dense_cells(config, sweep_cells(config))
    assert [(cell.label, cell.run.model.source) for cell in tuned] == [
        ("dense, tuned, a/small", "a/small"), ("dense, tuned, b/large", "b/large"),
    ]  # fmt: skip


EMBEDDING = 200


def dense_row(label: str, parameters: int, perplexity: float, **figures: Any) -> SweepRow:
    """A dense model's row, as `measure` would fill it in."""
    body = parameters - EMBEDDING
    sizes = {"parameters": parameters, "body": body, "dense_parameters": parameters, "dense_body": body}
    return SweepRow(label, 0.0, **sizes, perplexity=perplexity, dense_perplexity=perplexity, **figures)


DENSE = dense_row("dense", 1000, 20.0, accuracy=0.5, accuracy_stderr=0.01, examples=200)


def cell_row(
    label: str, ratio: float, parameters: int, perplexity: float, dense: SweepRow = DENSE, **figures: Any
) -> SweepRow:
    """One setting's row, as `measure` would fill it in; all tokens stay."""
    beside = {"dense_parameters": dense.parameters, "dense_body": dense.body, "dense_perplexity": dense.perplexity}
    sizes = {"parameters": parameters, "body": parameters - EMBEDDING}
    return SweepRow(label, ratio, **sizes, perplexity=perplexity, **beside, **figures)


ROWS = (
    DENSE,
    cell_row("norm", 0.2, 800, 50.0, accuracy=0.4, accuracy_stderr=0.01, examples=200),
    cell_row("norm", 0.1, 900, 30.0, accuracy=0.45, accuracy_stderr=0.01, examples=200),
    SweepRow("<b>random</b>", 0.2, error="CUDA out of memory"),
)


def on_piqa(row: SweepRow) -> list[RecoveryRow]:
    """A scored row's only benchmark."""
    if row.accuracy is None:
        return []
    figures = {name: getattr(row, name) for name in ("accuracy", "recovery", "recovery_low", "recovery_high")}
    return [RecoveryRow(row.ratio, row.label, "piqa", "acc_norm", 200, 0.5, stderr=row.accuracy_stderr, **figures)]


def written(config: SweepConfig, out: Path, *rows: SweepRow) -> str:
    out.mkdir()
    write_sweep(config, [(row, on_piqa(row)) for row in rows], out=out)
    assert read_sweep(out) == list(rows)
    found = read_rows(out / "benchmarks.parquet", RecoveryRow)
    assert found == [one for row in rows for one in on_piqa(row)]
    return (out / "sweep.html").read_text()


@pytest.fixture
def config(tmp_path: Path) -> SweepConfig:
    return load_sweep(sweep_file(tmp_path, GRID))


def test_the_page_holds_every_cell(config: SweepConfig, tmp_path: Path) -> None:
    page = written(config, tmp_path / "out", *ROWS)
    assert "3 settings, of which 1 failed." in page
    assert "&lt;b&gt;random&lt;/b&gt;" in page
    assert "failed: CUDA out of memory" in page
    assert "<b>random" not in page
    text = re.sub(r"<[^>]*>|\s+", " ", page)
    assert re.search(r"norm 20\.00.% 25\.00.% 800 50\.00 2\.50 0\.400", " ".join(text.split()))
    assert re.search(
        r"piqa acc_norm floor – 0\.500 dense – 0\.500 ± 0\.010 norm 20\.00.% 25\.00.% 0\.400", " ".join(text.split())
    )
    markdown = (tmp_path / "out" / "sweep.md").read_text()
    assert "| norm | 20.00 % (25.00 %) | 800 | 50.00 | 2.50 | 0.400 ± 0.010 |" in markdown.replace("\xa0", " ")
    assert "failed: CUDA out of memory" in markdown
    assert "<b>random" not in markdown
    shared = page[page.index("<h2>What all cells share") :]
    assert "min_kv_heads = 2" in shared
    assert "<dt>Accuracy</dt>" in page
    assert "<dt>Seeds</dt>" not in page
    assert "criterion" not in shared
    assert "ratios" not in shared


def test_a_sweep_without_scores_or_without_success_is_still_a_page(config: SweepConfig, tmp_path: Path) -> None:
    dense = dense_row("dense", 1000, 20.0)
    seeds: dict[str, Any] = {"seeds": 3, "perplexity_least": 40.0, "perplexity_most": 65.0}
    page = written(config, tmp_path / "unscored", dense, cell_row("norm", 0.2, 800, 50.0, **seeds))
    assert "40.00–65.00" in page  # the lowest and the highest seed
    assert "1 settings, each with 3 seeds." in page
    assert "<dt>Seeds</dt>" in page
    assert not re.search("<dt>(Accuracy|Intervals|Template sets)</dt>", page)
    assert "1 settings, of which 1 failed." in written(config, tmp_path / "failed", DENSE, ROWS[3])


def test_several_models_are_each_beside_their_own_dense_one(tmp_path: Path) -> None:
    grid = '[[grid]]\n"model.source" = ["small", "large"]\n'
    config = load_sweep(sweep_file(tmp_path, grid))
    figures: dict[str, Any] = {"accuracy": 0.4, "accuracy_stderr": 0.01, "examples": 200}
    small, large = (
        dense_row(f"dense, {name}", n, p, **figures) for name, n, p in (("small", 1000, 20.0), ("large", 5000, 8.0))
    )
    recovered: dict[str, Any] = {"recovery": 0.9, "recovery_low": 0.8, "recovery_high": 1.0, **figures}
    rows = (
        small,
        large,
        cell_row(
            "small", 0.2, 800, 50.0, small, **recovered, chance_corrected=0.5, cc_low=-0.1, cc_high=0.7, cc_benchmarks=1
        ),
        cell_row("large", 0.2, 4000, 12.0, large, **recovered),
    )
    page = written(config, tmp_path / "out", *rows)
    assert "<h1>Sweep of small, large</h1>" in page
    assert "2 settings." in page
    text = " ".join(re.sub(r"<[^>]*>|\s+", " ", page).split())
    assert (
        "dense, large – 5,000 8.00 1.00 0.400 ± 0.010 100 % 100 % small 20.00 % 25.00 % 800 50.00 2.50 0.400"
        in text.replace("\xa0", " ").replace("&nbsp;", " ")
    )
    markdown = (tmp_path / "out" / "sweep.md").read_text().replace("\xa0", " ")
    assert "| 90.0 % (80.0 to 100.0 %) | 50.0 % (−10.0 to 70.0 %; over 1) |" in markdown
    assert (
        "| large | 20.00 % (20.83 %) | 4,000 | 12.00 | 1.50 | 0.400 ± 0.010 | 90.0 % (80.0 to 100.0 %) | – |"
        in markdown
    )


def test_the_tuned_dense_model_has_a_recovery_but_is_no_setting(tmp_path: Path) -> None:
    config = load_sweep(sweep_file(tmp_path, GRID), ["tailored=true", "tuning.dense=true"])
    figures: dict[str, Any] = {"accuracy": 0.6, "accuracy_stderr": 0.01, "examples": 200}
    tuned = dense_row("dense, tuned", 1000, 20.0, **figures)
    tuned = replace(tuned, recovery=1.2, recovery_low=1.1, recovery_high=1.3)
    norm = [replace(row, recovery=0.8, recovery_low=0.7, recovery_high=0.9) for row in ROWS[1:3]]
    page = written(config, tmp_path / "out", DENSE, tuned, *norm)
    assert "2 settings." in page
    text = " ".join(re.sub(r"<[^>]*>|\s+", " ", page).split()).replace("\xa0", " ").replace("&nbsp;", " ")
    assert (
        "dense – 1,000 20.00 1.00 0.500 ± 0.010 100 % 100 % dense, tuned – 1,000 20.00 1.00 0.600 ± 0.010 120.0 %"
        in text
    )
    markdown = (tmp_path / "out" / "sweep.md").read_text().replace("\xa0", " ")
    assert "| dense, tuned | – | 1,000 | 20.00 | 1.00 | 0.600 ± 0.010 | 120.0 % (110.0 to 130.0 %) | – |" in markdown


def made(folder: Path, name: str, perplexity: float, right: list[int]) -> MeasuredModel:
    """A model that is right where `right` says, of eight examples."""
    place, measured = folder / name / "scores", folder / name / "perplexity"
    place.mkdir(parents=True)
    measured.mkdir()
    columns = {
        "example": range(8),
        "loglikelihoods": [[0.0, 0.0]] * 8,
        "prediction": right,
        "prediction_norm": right,
        "answer": [1] * 8,
    }
    write_table(place / "predictions.parquet", columns, PREDICTIONS_SCHEMA)
    found = {"metric": "acc", "floor": 0.25, "examples": 8, **metrics({"acc": [float(hit) for hit in right]})}
    (place / "metrics.json").write_text(json.dumps(found))
    (measured / "metrics.json").write_text(json.dumps({"perplexity": perplexity, "tokens": 100}))
    return MeasuredModel(folder / "model", measured, {"piqa": place})


def test_seeds_are_averaged_example_by_example(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny)
    both = [made(tmp_path, "a", 40.0, [1, 1, 1, 0, 0, 0, 0, 0]), made(tmp_path, "b", 60.0, [0, 1, 1, 1, 1, 1, 0, 0])]
    dense = made(tmp_path, "dense", 20.0, [1] * 6 + [0] * 2)
    row, (piqa,) = measure(SweepRow("norm", 0.2), both, [dense, dense])
    assert (piqa.benchmark, piqa.accuracy, piqa.recovery) == ("piqa", row.accuracy, row.recovery)
    assert (piqa.model, piqa.metric, piqa.floor) == ("norm", "acc", 0.25)
    assert (row.seeds, row.perplexity, row.perplexity_least, row.perplexity_most) == (2, 50.0, 40.0, 60.0)
    assert (row.removed, row.removed_of_body, row.times_dense, row.accuracy) == (0.0, 0.0, 2.5, 0.5)
    smaller = save_tiny_llama(tmp_path / "smaller", num_hidden_layers=2)
    pruned, _ = measure(SweepRow("norm", 0.2), [both[0], replace(both[1], checkpoint=smaller)], [dense, dense])
    sizes = [read_structure(folder).size for folder in (tiny, smaller)]
    assert (pruned.parameters, pruned.dense_parameters) == (sum(s.parameters for s in sizes) / 2, sizes[0].parameters)
    assert (pruned.body, pruned.dense_body) == (sum(s.body for s in sizes) / 2, sizes[0].body)
    assert (row.recovery, row.recovery_least, row.recovery_most) == (pytest.approx(4 / 6), 0.5, pytest.approx(5 / 6))
    low, high = row.recovery_low, row.recovery_high
    assert low is not None
    assert high is not None
    assert low < 4 / 6 < high <= 1
    alone, _ = measure(SweepRow("norm", 0.2), both[:1], [dense])
    assert (alone.recovery_low or 0) < low  # two halves of an example vary less than a whole one


def test_the_console_table(config: SweepConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(config, tmp_path / "out", *ROWS)
    Console(width=100).print(stored_table(tmp_path / "out"))
    lines: list[Any] = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["norm", "20.0", "/", "25.0", "%", "50.00", "2.50", "0.400±.010"] in lines
    assert any(line[:1] == ["<b>random</b>"] and "failed:" in line for line in lines)
