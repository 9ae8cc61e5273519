"""A model far larger than the memory that its process may take: pruned, fitted, read and scored, without asking."""

from __future__ import annotations

from pathlib import Path

import pytest

import reach
from helpers import CPU
from tailored_llama.config import ExecutionConfig
from tailored_llama.models import weight_bytes

SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 60, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 300,
}  # fmt: skip
LIMIT = 112 * 2**20


def test_a_model_three_times_as_large_as_memory_goes_the_whole_way(tmp_path: Path) -> None:
    dense, root = tmp_path / "dense", tmp_path / "stages"
    reach.prepare(dense, root, SHAPE)
    assert weight_bytes(dense) > 3 * LIMIT
    with pytest.raises(Exception, match=r"memory|allocate"):
        reach.alone(
            dense, root, "importance", 0.2, "sequential", ExecutionConfig(device="cpu", streaming="never"), LIMIT
        )
    for stage in reach.STAGES[1:]:
        found = reach.alone(dense, root, stage, 0.2, "sequential", CPU, LIMIT, 2**24)
        assert any((root / stage).iterdir()), found
