"""The pipeline with a text of its own for healing."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from compositions import compose, folders
from tailored_llama.config import validate_config
from tailored_llama.evaluation import read_recovery


def sources(calibration: Path) -> list[str]:
    return pq.read_table(calibration / "calibration.parquet")["source"].to_pylist()


def test_healing_on_a_text_of_its_own(own_run: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "data" / "other.txt"
    other.write_text("Pack my box with five dozen liquor jugs. " * 40)
    own_run["healing"] = {"tokens": 128, "source": str(other)}
    _, sizes = read_recovery(compose("tailor", validate_config(own_run)))
    perplexities = {model.model: model.perplexity for model in sizes}
    assert perplexities["healed"] not in (None, perplexities["pruned"])
    pruned_by, healed_on = sorted(map(sources, folders(own_run["store"]["root"], "calibration")), key=len)
    assert len(healed_on) > len(pruned_by)
    assert len({*healed_on}) == len({*pruned_by}) == 1
    assert not {*pruned_by} & {*healed_on}
