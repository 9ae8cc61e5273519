"""SmolLM2-135M-Instruct, dense and with a fifth or half of its parameters pruned; made once for all processes."""

from pathlib import Path

import pytest

from helpers import CPU
from real_models import dense, pruned
from tailored_llama.config import RunConfig, StoreConfig, load_config
from tailored_llama.data import CalibrationSettings
from tailored_llama.pipeline import StoreExecutor, stages
from tailored_llama.pipeline.graph import Node

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart.toml"


@pytest.fixture(scope="session")
def quickstart() -> RunConfig:
    """In float32, where scores can be compared to the last digits; heads and channels alone, by 4 × 256 tokens."""
    changed = ["calibration.source=boolq", "calibration.tokens=256", 'pruning.kinds=["attention","mlp"]']
    return load_config(QUICKSTART, ["model.dtype=float32", *changed])


@pytest.fixture(scope="session")
def models(
    quickstart: RunConfig, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> StoreExecutor:
    """Makes what no process of pytest-xdist has made yet; one that is at work on the same is waited for."""
    folder = tmp_path_factory.getbasetemp()
    root = (folder.parent if hasattr(request.config, "workerinput") else folder) / "models"
    return StoreExecutor(StoreConfig(root=str(root), downloads=quickstart.store.downloads), CPU)


SMOLLM2 = dense("smollm2-135m-instruct")


def by_gradients(run: RunConfig, ratio: float) -> Node:
    text = stages.calibration("text", settings=CalibrationSettings.of(run), dense=SMOLLM2, prompts={})
    return pruned(SMOLLM2, ratio, run.pruning, text=text, reconstruction=run.reconstruction)


@pytest.fixture(scope="session")
def smollm2(models: StoreExecutor) -> Path:
    return models.open(SMOLLM2)


@pytest.fixture(scope="session")
def pruned_smollm2(models: StoreExecutor, quickstart: RunConfig) -> Path:
    return models.open(by_gradients(quickstart, 0.2))


@pytest.fixture(scope="session")
def halved_smollm2(models: StoreExecutor, quickstart: RunConfig) -> Path:
    """Half of all parameters gone: a model worth little before tuning."""
    return models.open(by_gradients(quickstart, 0.5))


@pytest.fixture(scope="session")
def plain_smollm2(models: StoreExecutor, quickstart: RunConfig) -> Path:
    """Pruned by size: for what must hold for any weights."""
    return models.open(pruned(SMOLLM2, 0.2, quickstart.pruning))


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether scores are compared on many documents."""
    return bool(request.config.getoption("--full"))
