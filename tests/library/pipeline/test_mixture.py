"""The pipeline on calibration text of several sources, and on a text of its own for healing."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from compositions import built, compose, folders
from helpers import save_worded_llama
from tailored_llama.config import validate_config
from tailored_llama.evaluation import read_recovery


def sources(calibration: Path) -> list[str]:
    return pq.read_table(calibration / "calibration.parquet")["source"].to_pylist()


@pytest.fixture
def mixed_run(own_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The run on three sources: a file, the run's prompts, and another file."""
    file = own_run["calibration"]["source"]
    other = tmp_path / "data" / "other.txt"
    other.write_text("Pack my box with five dozen liquor jugs. " * 40)
    own_run["calibration"]["source"] = [{"source": file, "weight": 2.0}, "prompts", str(other)]
    own_run["model"] = {"source": str(save_worded_llama(tmp_path / "worded")), "dtype": "float32"}
    return own_run


def test_a_run_on_several_texts(mixed_run: dict[str, Any], tmp_path: Path) -> None:
    mixed_run["store"]["export"] = str(tmp_path / "finished")
    mixed_run["pruning"] |= {"kinds": ["attention", "mlp", "vocabulary"], "vocabulary": 448, "ratios": [0.35]}
    compose("tailor", validate_config(mixed_run))
    root = mixed_run["store"]["root"]
    (calibration,) = folders(root, "calibration")
    assert sorted(Counter(sources(calibration)).values()) == [1, 1, 2]
    assert "prompts" in sources(calibration)
    assert len(folders(root, "tokens")) == 1
    card = (tmp_path / "finished" / "colours-0.35" / "README.md").read_text()
    assert all(f'"source": "{name}"' in card for name in ("text.txt", "prompts", "other.txt"))
    assert str(tmp_path) not in card

    before = built(root)
    compose("tailor", validate_config(mixed_run))
    assert built(root) == before
    mixed_run["calibration"]["source"][0]["weight"] = 1.0  # the same shares of four sequences
    mixed_run["tuning"]["examples"] = "none"
    del mixed_run["store"]["export"]
    compose("tailor", validate_config(mixed_run))
    assert folders(root, "calibration") == [calibration]


def test_healing_on_a_text_of_its_own(mixed_run: dict[str, Any]) -> None:
    text, _, other = mixed_run["calibration"]["source"]
    mixed_run["calibration"]["source"] = text["source"]
    mixed_run["healing"] = {"tokens": 128, "source": other}
    _, sizes = read_recovery(compose("tailor", validate_config(mixed_run)))
    perplexities = {model.model: model.perplexity for model in sizes}
    assert perplexities["healed"] not in (None, perplexities["pruned"])
    pruned_by, healed_on = sorted(map(sources, folders(mixed_run["store"]["root"], "calibration")), key=len)
    assert (len(pruned_by), len(healed_on)) == (4, 8)
    assert len(set(healed_on)) == 1
    assert not set(pruned_by) & set(healed_on)
