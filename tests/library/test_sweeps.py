"""Sweeps: which cells a grid makes, what is said of a bad one, and what the table and the page say of good ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tailored_llama.errors import InputError
from tailored_llama.sweeps import Row, SweepConfig, cells, console_table, load_sweep, read_sweep, write_sweep

GRID = '[[grid]]\n"pruning.criterion" = ["flap", "random"]\n"pruning.ratios" = [0.1, 0.2]\n'


def sweep_file(folder: Path, grid: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text('benchmarks = ["piqa"]\n[pruning]\nprotect_last = 2\n' + grid)
    return path


def test_a_table_makes_every_combination_and_tables_are_joined(tmp_path: Path) -> None:
    again = '[[grid]]\n"reconstruction.method" = ["bias"]\n"pruning.ratios" = [0.2]\n' + GRID
    found = cells(load_sweep(sweep_file(tmp_path, GRID + again), ["scoring.limit=5"]))
    assert [(cell.label, *cell.run.pruning.ratios) for cell in found] == [
        ("flap, static", 0.1), ("flap, static", 0.2), ("random, static", 0.1), ("random, static", 0.2),
        ("taylor_gate, bias", 0.2),
    ]  # fmt: skip
    assert [cell.run.pruning.criterion for cell in found] == ["flap", "flap", "random", "random", "taylor_gate"]
    assert {(cell.run.pruning.protect_last, cell.run.scoring.limit) for cell in found} == {(2, 5)}


def test_cells_that_differ_have_labels_that_differ(tmp_path: Path) -> None:
    first, last = ('[[grid]]\n"pruning.protect_' + end + '" = [1]\n' for end in ("first", "last"))
    labels = [cell.label for cell in cells(load_sweep(sweep_file(tmp_path, first + last)))]
    assert labels == ["protect_first=1, protect_last=2", "protect_first=0, protect_last=1"]


def test_ratios_of_the_run_are_cells_where_the_grid_names_none(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, '[[grid]]\n"pruning.criterion" = ["flap"]\n')
    found = cells(load_sweep(path, ["pruning.ratios=[0.3, 0.4]"]))
    assert [cell.run.pruning.ratios for cell in found] == [(0.3,), (0.4,)]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("", "grid: not set"),
        ("grid = []", "grid: got []; allowed: at least 1 item"),
        ('[[grid]]\n"pruning.criterion" = "flap"', "grid.0.pruning.criterion: got 'flap'; allowed: a list"),
        (
            GRID + '"pruning.steps" = [0]',
            "grid, cell {'pruning.criterion': 'flap', 'pruning.ratios': 0.1, 'pruning.steps': 0}: pruning.steps: got 0",
        ),
        (GRID + '"pruning.step" = [2]', "pruning.step: unknown key; did you mean pruning.steps?"),
        (GRID + '[[grid]]\n"pruning.criterion" = []', "grid.1.pruning.criterion: got []; allowed: at least 1 item"),
        (
            GRID + '"seed.foo" = [1]',
            "grid, cell {'pruning.criterion': 'flap', 'pruning.ratios': 0.1, 'seed.foo': 1}: seed",
        ),
        (
            GRID + '"model.source" = ["other"]',
            "grid: got 'model.source'; allowed: seed, and the fields of calibration, pruning, reconstruction",
        ),
    ],
)
def test_a_bad_grid_is_named(tmp_path: Path, grid: str, message: str) -> None:
    place = "benchmarks = ['piqa']\n" + grid
    (tmp_path / "sweep.toml").write_text(place)
    with pytest.raises(InputError, match=re.escape(message)):
        load_sweep(tmp_path / "sweep.toml")


DENSE = Row("dense", 0.0, 1000, 20.0, 0.5, 0.01, 200)
ROWS = (
    DENSE,
    Row("flap", 0.2, 800, 50.0, 0.4, 0.01, 200),
    Row("flap", 0.1, 900, 30.0, 0.45, 0.01, 200),
    Row("<b>random</b>", 0.2, error="CUDA out of memory"),
)


def written(config: SweepConfig, out: Path, *rows: Row) -> str:
    out.mkdir()
    write_sweep(config, rows[0], rows[1:], out)
    assert read_sweep(out) == list(rows)
    return (out / "sweep.html").read_text()


@pytest.fixture
def config(tmp_path: Path) -> SweepConfig:
    return load_sweep(sweep_file(tmp_path, GRID))


def test_the_page_holds_every_cell_and_draws_those_that_have_figures(config: SweepConfig, tmp_path: Path) -> None:
    page = written(config, tmp_path / "out", *ROWS)
    assert page.count("<svg") == 2
    assert "3 cells, of which 1 failed" in page
    assert "Lowest perplexity: 30.00 at 10\xa0% (flap); 50.00 at 20\xa0% (flap); dense: 20.00." in page
    assert "&lt;b&gt;random&lt;/b&gt;" in page
    assert "failed: CUDA out of memory" in page
    assert "<b>random" not in page
    text = re.sub(r"<[^>]*>|\s+", " ", page)
    assert re.search(r"flap 20\.00.% 800 50\.00 2\.50 0\.400", " ".join(text.split()))
    shared = page[page.index("What all cells share") :]
    assert "protect_last = 2" in shared
    assert "criterion" not in shared
    assert "ratios" not in shared


def test_a_sweep_without_scores_or_without_success_is_still_a_page(config: SweepConfig, tmp_path: Path) -> None:
    dense = Row("dense", 0.0, 1000, 20.0)
    assert written(config, tmp_path / "unscored", dense, Row("flap", 0.2, 800, 50.0)).count("<svg") == 1
    assert written(config, tmp_path / "failed", DENSE, ROWS[3]).count("<svg") == 0


def test_the_console_table(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=100).print(console_table(ROWS))
    lines: list[Any] = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["flap", "20.00", "%", "50.00", "2.50", "0.400±.010"] in lines
    assert any(line[:1] == ["<b>random</b>"] and "failed:" in line for line in lines)
