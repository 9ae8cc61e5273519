"""SmolLM2-135M-Instruct, dense and with a fifth or half of its parameters pruned; built once per process."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import CPU, prune
from tailored_llama.config import RunConfig, Work, load_config
from tailored_llama.config.schema import Shape
from tailored_llama.data import CalibrationSettings, load_calibration
from tailored_llama.models import DenseSettings, prepare_dense
from tailored_llama.pruning import ImportanceSettings, build_graph, score_importance

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart.toml"


@pytest.fixture(scope="session")
def quickstart() -> RunConfig:
    """In float32, where scores can be compared to the last digits; heads and channels alone, by 4 × 256 tokens."""
    changed = ["calibration.source=boolq", "calibration.tokens=256", 'pruning.kinds=["attention","mlp"]']
    return load_config(QUICKSTART, ["model.dtype=float32", *changed])


@pytest.fixture(scope="session")
def smollm2(quickstart: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2")
    work = Work(out, downloads=quickstart.store.downloads)
    prepare_dense(settings=DenseSettings.of(quickstart.model), work=work)
    return out


@dataclass(frozen=True)
class Scored:
    """The folders that a pruning by gradients reads."""

    groups: Path
    calibration: Path
    importance: Path


@pytest.fixture(scope="session")
def scored_smollm2(quickstart: RunConfig, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    scored = Scored(*(tmp_path_factory.mktemp(name) for name in ("groups", "text", "score")))
    build_graph(smollm2, settings=None, work=Work(scored.groups))
    drawn = CalibrationSettings.of(quickstart)
    load_calibration(smollm2, {}, settings=drawn, work=Work(scored.calibration, downloads=quickstart.store.downloads))
    criterion = ImportanceSettings(quickstart.pruning.criterion, 0)
    score_importance(smollm2, scored.groups, scored.calibration, settings=criterion, work=Work(scored.importance, CPU))
    return scored


def prune_by_gradients(dense: Path, scored: Scored, run: RunConfig, ratio: float, out: Path) -> Path:
    read = (scored.groups, scored.importance, scored.calibration)
    pruning = run.pruning.model_copy(update={"shape": "any"})
    prune(dense, *read, ratio=ratio, pruning=pruning, reconstruction=run.reconstruction, out=out)
    return out


@pytest.fixture(scope="session")
def pruned_smollm2(
    smollm2: Path, scored_smollm2: Scored, quickstart: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return prune_by_gradients(smollm2, scored_smollm2, quickstart, 0.2, tmp_path_factory.mktemp("pruned"))


@pytest.fixture(scope="session")
def halved_smollm2(
    smollm2: Path, scored_smollm2: Scored, quickstart: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Half of all parameters gone: a model worth little before tuning."""
    return prune_by_gradients(smollm2, scored_smollm2, quickstart, 0.5, tmp_path_factory.mktemp("halved"))


def prune_by_size(dense: Path, run: RunConfig, shape: Shape, factory: pytest.TempPathFactory) -> Path:
    """Prune by the size of the weights alone, which takes seconds; the model is worth little."""
    groups, importance, out = (factory.mktemp(name) for name in ("groups", "importance", shape))
    build_graph(dense, settings=None, work=Work(groups))
    score_importance(dense, groups, None, settings=ImportanceSettings("magnitude_l2"), work=Work(importance, CPU))
    pruning = run.pruning.model_copy(update={"shape": shape})
    prune(dense, groups, importance, None, ratio=0.2, pruning=pruning, out=out)
    return out


@pytest.fixture(scope="session")
def layered_smollm2(smollm2: Path, quickstart: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned by size, layers of different widths: for what must hold for any weights."""
    return prune_by_size(smollm2, quickstart, "any", tmp_path_factory)


@pytest.fixture(scope="session")
def uniform_smollm2(smollm2: Path, quickstart: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned by size alike in every layer: a checkpoint of a stock architecture."""
    return prune_by_size(smollm2, quickstart, "stock", tmp_path_factory)


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether scores are compared on many documents."""
    return bool(request.config.getoption("--full"))
