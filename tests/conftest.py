"""Fixtures: the tiny model and a whole run configuration on it."""

# ruff: noqa: E402
from __future__ import annotations

import gc

gc.disable()  # until all tests are collected: there is no garbage yet, and looking for it takes a third of the time

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import save_tiny_llama, write_own_benchmark
from tailored_llama.console import quiet_libraries


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="compare with lm-evaluation-harness on many documents")
    parser.addoption("--vllm", default=".venv-vllm/bin/python", metavar="PYTHON", help="a Python with vLLM")
    faults = parser.getgroup("faults")
    faults.addoption("--kills", type=int, default=12, help="moments at which the flow is killed")
    faults.addoption("--tiny", action="store_true", help="break runs on the tiny model instead of SmolLM2")
    faults.addoption("--faults-out", default="reports/faults", metavar="FOLDER", help="where the table is written")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    quiet_libraries()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense tiny checkpoint."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "dense")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """Make a new folder below the test's own."""

    def make(name: str) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        return path

    return make


@pytest.fixture
def own_run(tmp_path: Path, tiny: Path) -> dict[str, Any]:
    """A whole run configuration on the tiny model and the user's own benchmark, as plain data."""
    (tmp_path / "data").mkdir()
    text = tmp_path / "data" / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return {
        "benchmarks": [write_own_benchmark(tmp_path / "data")],
        "model": {"source": str(tiny), "dtype": "float32"},
        "calibration": {"source": str(text), "samples": 4, "tokens": 16},
        "pruning": {"ratios": [0.2], "kinds": ["attention", "mlp"], "min_channels": 4},
        "tuning": {"shots": 8, "held_out": 4, "epochs": 2, "learning_rate": 1e-2, "dense": False},
        "perplexity": {"source": str(text), "window": 32, "tokens": 128},
        "profile": {"batches": []},
        "store": {
            "root": str(tmp_path / "store"),
            "downloads": str(tmp_path / "downloads"),
            "reports": str(tmp_path / "reports"),
        },
    }
