"""The flow with widths that a search finds: its artifacts, what they depend on, and what a run finds again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from flows.sweep import sweep
from flows.tailor import tailor
from helpers import save_tiny_llama
from tailored_llama.config import SweepConfig, validate_as, validate_config
from tailored_llama.evaluation import read_sweep
from tailored_llama.models import read_structure
from tasks._stage import open_store


def folders(run: dict[str, Any], stage: str) -> list[Path]:
    return sorted(Path(run["store"]["root"]).glob(f"{stage}/*"))


def test_a_run_searches_once_for_each_ratio(own_run: dict[str, Any], tmp_path: Path) -> None:
    own_run["pruning"] |= {"allocation": "search", "search_evaluations": 20, "ratios": [0.2, 0.3]}
    own_run["store"]["export"] = str(tmp_path / "finished")
    tailor(validate_config(own_run))
    assert len(folders(own_run, "allocation")) == len(folders(own_run, "pruned")) == 2
    widths = {
        tuple(pq.read_table(folder / "allocation.parquet")["kept"].to_pylist())
        for folder in folders(own_run, "allocation")
    }
    pruned = {
        tuple(width for layer in read_structure(folder).layers for width in (layer.kv_heads, layer.channels))
        for folder in folders(own_run, "pruned")
    }
    assert widths == pruned
    card = (tmp_path / "finished" / "colours-0.2" / "README.md").read_text()
    assert "allocation search" in " ".join(card.split())

    built = set(Path(own_run["store"]["root"]).glob("[!.]*/*"))
    own_run["scoring"] = {"limit": 5}  # of the evaluation split, which no search reads
    tailor(validate_config(own_run))
    new = {path.parent.name for path in set(Path(own_run["store"]["root"]).glob("[!.]*/*")) - built}
    assert not new & {"allocation", "pruned", "adapter"}
    own_run["pruning"]["search_evaluations"] = 0
    tailor(validate_config(own_run))
    assert len(folders(own_run, "allocation")) == 4


def test_a_sweep_compares_allocations(own_run: dict[str, Any], tmp_path: Path) -> None:
    own_run["model"] = {"source": str(save_tiny_llama(tmp_path / "wide", intermediate_size=96))}
    own_run["pruning"]["search_evaluations"] = 10
    grid = [{"pruning.allocation": ["global", "search"]}]
    config = validate_as(SweepConfig, own_run | {"grid": grid, "scored": False})
    _, ranked, searched = read_sweep(open_store(config.store).open(sweep(config)))
    assert (ranked.error, searched.error) == (None, None)
    assert len(folders(own_run, "allocation")) == 1
