"""The pipeline with whole layers as a kind of group: what ranks them is found again, and what is left is scored."""

from __future__ import annotations

from typing import Any

from compositions import compose, folders
from tailored_llama.config import validate_config
from tailored_llama.evaluation import read_recovery
from tailored_llama.models import read_config


def test_a_run_that_removes_a_layer_by_the_calibration_text(own_run: dict[str, Any]) -> None:
    """The criterion reads no text, and the fits are none; the influence of layers is measured all the same."""
    own_run["pruning"] |= {"kinds": ["layer", "mlp"], "layers": 1, "criterion": "random", "ratios": [0.3]}
    own_run["reconstruction"] = {"method": "none"}
    report, root = compose("tailor", validate_config(own_run)), own_run["store"]["root"]
    (importance,), (pruned,) = folders(root, "importance"), folders(root, "pruned")
    assert (importance / "influence.parquet").is_file()
    assert read_config(pruned)["num_hidden_layers"] == 3
    _, (dense, left) = read_recovery(report)
    assert 1 - (left.parameters or 0) / (dense.parameters or 1) < 0.31
    own_run["pruning"] |= {"ratios": [0.35]}
    compose("tailor", validate_config(own_run))
    assert len(folders(root, "importance")) == 1
    assert len(folders(root, "pruned")) == 2
