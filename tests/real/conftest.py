"""SmolLM2-135M-Instruct, dense and with a fifth of its parameters pruned; built once per test session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tailored_llama.calibration import load_calibration
from tailored_llama.config import RunConfig
from tailored_llama.config_loading import load_config
from tailored_llama.models import load_model, model_identity
from tailored_llama.pruning.groups import build_graph
from tailored_llama.pruning.importance import score_importance
from tailored_llama.pruning.prune import prune

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart.toml"


@pytest.fixture(scope="session")
def quickstart() -> RunConfig:
    return load_config(QUICKSTART)


@pytest.fixture(scope="session")
def smollm2(quickstart: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2")
    load_model(quickstart.model, model_identity(quickstart.model), quickstart.store.downloads, out)
    return out


@pytest.fixture(scope="session")
def pruned_smollm2(quickstart: RunConfig, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    groups, calibration, importance, out = (tmp_path_factory.mktemp(n) for n in ("groups", "text", "score", "pruned"))
    build_graph(smollm2, groups)
    load_calibration(smollm2, quickstart.calibration, quickstart.store.downloads, 0, calibration)
    score_importance(smollm2, calibration, groups, quickstart.pruning.criterion, 0, importance)
    prune(smollm2, groups, importance, 0.2, quickstart.pruning, quickstart.reconstruction, calibration, out)
    return out
