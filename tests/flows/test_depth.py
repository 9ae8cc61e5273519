"""The flow with whole layers as a kind of group: what ranks them is found again, what is left is tuned and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.tailor import tailor
from tasks._stage import open_store

from tailored_llama.config import validate_config
from tailored_llama.evaluation import read_recovery
from tailored_llama.models import read_config


def folders(run: dict[str, Any], stage: str) -> list[Path]:
    return sorted(Path(run["store"]["root"]).glob(f"{stage}/*"))


def test_a_run_that_removes_a_layer_by_the_calibration_text(own_run: dict[str, Any]) -> None:
    """The criterion reads no text, and the fits are none; the influence of layers is measured all the same."""
    own_run["pruning"] |= {"kinds": ["layer", "mlp"], "layers": 1, "criterion": "random", "ratios": [0.3]}
    own_run["reconstruction"] = {"method": "none"}
    config = validate_config(own_run)
    report = open_store(config.store).open(tailor(config))
    (importance,), (pruned,) = folders(own_run, "importance"), folders(own_run, "pruned")
    assert (importance / "influence.parquet").is_file()
    assert read_config(pruned)["num_hidden_layers"] == 3
    _, (dense, left) = read_recovery(report)
    assert 1 - (left.parameters or 0) / (dense.parameters or 1) < 0.31
    own_run["pruning"] |= {"ratios": [0.35]}
    tailor(validate_config(own_run))
    assert len(folders(own_run, "importance")) == 1
    assert len(folders(own_run, "pruned")) == 2
