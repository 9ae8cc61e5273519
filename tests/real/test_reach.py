"""A model far larger than the memory that its process may take."""

from pathlib import Path

import pytest

import reach
from helpers import CPU
from tailored_llama.config import ExecutionConfig
from tailored_llama.models import weight_bytes

pytestmark = pytest.mark.real

SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 60, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 300, "dtype": "float32",  # some CPUs are slow in bfloat16
}  # fmt: skip
LIMIT = 200 * 2**20  # above an idle process; half of it goes to libraries and the stacks of threads


def test_importance_of_a_model_three_times_as_large_as_memory(tmp_path: Path) -> None:
    dense, root = tmp_path / "dense", tmp_path / "stages"
    reach.prepare(dense, root, SHAPE)
    assert weight_bytes(dense) > 3 * LIMIT
    whole = ExecutionConfig(device="cpu", streaming="never")
    with pytest.raises(Exception, match=r"memory|allocate"):
        reach.alone(dense, root, "importance", 0.2, "none", whole, LIMIT)
    reach.alone(dense, root, "importance", 0.2, "none", CPU, LIMIT)  # streams without being told to
    assert (root / "importance" / "importance.parquet").is_file()
