"""Memory of importance scoring, on a model large enough for its weights to matter."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import pruning
from tailored_llama.processes import forking

pytestmark = pytest.mark.real

CONSTANT = 2**28  # bytes: activations of one sample, and logits of a few positions
STAGES = ("idle", "importance")


def test_importance_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    shape = pruning.SHAPES["1b"] | {"num_hidden_layers": 4}
    dense, root = tmp_path / "dense", tmp_path / "stages"
    pruning.write_checkpoint(dense, shape)
    # Few tokens, since some CPUs are slow in bfloat16. In float32 a copy of the weights in a wider type would not show.
    pruning.write_tokens(root / "tokens", shape["vocab_size"], samples=2, tokens=4)
    weights = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    pruning.measure(dense, root, 0.2, "graph")
    with ProcessPoolExecutor(1, forking()) as worker:
        idle, peak = (worker.submit(pruning.measure, dense, root, 0.2, stage).result()[1] for stage in STAGES)
    assert weights > 2 * CONSTANT
    assert peak - idle <= 1.15 * weights + CONSTANT
