"""SmolLM2-135M-Instruct, dense and with a fifth of its parameters pruned; built once per test session."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import CPU
from tailored_llama.config import RunConfig, load_config
from tailored_llama.data.calibration import load_calibration
from tailored_llama.models import prepare_dense
from tailored_llama.pruning.groups import build_graph
from tailored_llama.pruning.importance import score_importance
from tailored_llama.pruning.prune import prune

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart.toml"


@pytest.fixture(scope="session")
def quickstart() -> RunConfig:
    """In float32, where scores can be compared to the last digits."""
    return load_config(QUICKSTART, ["model.dtype=float32"])


@pytest.fixture(scope="session")
def smollm2(quickstart: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2")
    prepare_dense(quickstart.model, downloads=quickstart.store.downloads, out=out)
    return out


@pytest.fixture(scope="session")
def pruned_smollm2(quickstart: RunConfig, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    groups, calibration, importance, out = (tmp_path_factory.mktemp(n) for n in ("groups", "text", "score", "pruned"))
    build_graph(smollm2, out=groups)
    load_calibration(
        smollm2, calibration=quickstart.calibration, downloads=quickstart.store.downloads, seed=0, out=calibration
    )
    score_importance(
        smollm2, groups, calibration, criterion=quickstart.pruning.criterion, seed=0, out=importance, execution=CPU
    )
    prune(
        smollm2,
        groups,
        importance,
        calibration,
        ratio=0.2,
        pruning=quickstart.pruning,
        reconstruction=quickstart.reconstruction,
        out=out,
        execution=CPU,
    )
    return out


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether scores are compared on many documents."""
    return bool(request.config.getoption("--full"))
