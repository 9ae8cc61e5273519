"""Fixtures: prompts of the user's own benchmark to tune on."""

from pathlib import Path

import pytest

from helpers import load_and_render, write_own_benchmark
from tailored_llama.config import BenchmarkConfig


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Eight shots and eight held-out examples, in the test's own folder `prompts`."""
    (data := tmp_path / "data").mkdir()
    benchmark = BenchmarkConfig(**write_own_benchmark(data))
    return load_and_render(benchmark, tmp_path, split="train", shots=8, held_out=8)
