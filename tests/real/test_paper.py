"""The paper's own setting, stage by stage, on a stand-in with LLaMA-7B's 32 layers and real examples."""

from pathlib import Path

import pytest

from compositions import run_command
from helpers import save_tiny_llama
from tailored_llama.config import load_config
from tailored_llama.evaluation import read_recovery
from tailored_llama.models import read_structure

pytestmark = pytest.mark.real
PAPER = Path(__file__).parents[2] / "data" / "paper.toml"


def test_the_papers_setting_runs_on_a_stand_in(tmp_path: Path, full: bool) -> None:
    """At half the size, on three of the seven benchmarks; with --full also at a fifth less, and on all."""
    few = [] if full else ['benchmarks=["boolq", "winogrande", "openbookqa"]', "pruning.ratios=[0.5]"]
    config = load_config(PAPER, few)
    ratios = config.pruning.ratios
    sizes = {"num_hidden_layers": 32, "num_key_value_heads": 4, "intermediate_size": 512, "tie_word_embeddings": False}
    stand_in = save_tiny_llama(tmp_path / "stand-in", max_position_embeddings=2048, **sizes)
    small = [
        *few,
        f"model.source={stand_in}",
        "model.dtype=float32",
        f"store.root={tmp_path / 'store'}",
        "scoring.limit=2",
        "tuning.shots=2",
        "tuning.epochs=1",
        "tuning.held_out=1",
        "perplexity.tokens=256",
    ]
    status, _, error = run_command(PAPER, *(f"--set={changed}" for changed in small))
    assert status == 0, error
    (report,) = (tmp_path / "store" / "report").iterdir()
    rows, models = read_recovery(report)
    names = [*(benchmark.name for benchmark in config.benchmarks), "(mean)"]
    for model in ("dense", "pruned", "tailored"):
        asked = [(row.ratio, row.benchmark) for row in rows if row.model == model]
        assert asked == [(ratio, name) for ratio in ratios for name in names]
    before = read_structure(stand_in).parameters
    sizes_after = {model.ratio: model.parameters for model in models if model.model == "pruned"}
    assert sizes_after.keys() == set(ratios)
    for ratio, after in sizes_after.items():
        assert 1 - (after or 0) / before == pytest.approx(ratio, abs=3e-3)
