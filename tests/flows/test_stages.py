"""Stages as flows of their own make what the whole pipeline then finds, and refuse what is not in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import stages
from flows.tailor import tailor
from tailored_llama.config import RunConfig, validate_config
from tailored_llama.errors import InputError
from tailored_llama.preflight import preflight, preflight_tailor


@pytest.fixture
def config(own_run: dict[str, Any]) -> RunConfig:
    """With every stage that computes on the device; it dispatches to no deployment that is there."""
    own_run["execution"] = {"device": "cpu", "dispatch": "nowhere"}
    own_run["healing"], own_run["distillation"] = {"tokens": 128}, {"weight": 1.0, "top": 8}
    own_run["profile"] = {"batches": [1], "prompt_tokens": 8, "new_tokens": 2, "repeats": 1}
    return validate_config(own_run)


def made(config: RunConfig) -> set[Path]:
    return {path.parent for path in Path(config.store.root).glob("*/*/manifest.json")}


def test_stages_compute_here_even_where_tailor_would_dispatch_and_tailor_finds_what_they_made(
    config: RunConfig,
) -> None:
    def new(run: Callable[..., Any], **parameters: Any) -> dict[str, int]:
        """How many artifacts of each kind a flow makes."""
        before = made(config)
        run(config, **parameters)
        kinds = [path.parent.name for path in made(config) - before]
        return {kind: kinds.count(kind) for kind in sorted(kinds)}

    before = {"dense": 1, "examples": 1, "prompts": 2, "scores": 1}
    assert new(stages.score, benchmark="colours", model="dense") == before
    assert new(stages.importance) == {"calibration": 1, "groups": 1, "importance": 1}
    assert new(stages.perplexity, model="dense") == {"perplexity": 1}
    assert new(stages.prune, ratio=0.2) == {"pruned": 1}
    assert new(stages.profile, model="pruned @ 0.20") == {"profile": 1}
    assert new(stages.teach, source="text for healing") == {"calibration": 1, "teacher": 1}
    assert new(stages.heal, ratio=0.2) == {"healed": 1}
    assert new(stages.perplexity, model="pruned @ 0.20") == {"perplexity": 1}
    assert new(stages.perplexity, model="healed @ 0.20") == {"perplexity": 1}
    assert new(stages.teach, source="colours") == {"teacher": 1}
    assert new(stages.teach, source="text") == {"teacher": 1}
    assert new(stages.tune, benchmark="colours", ratio=0.2) == {"adapter": 1}
    assert new(stages.score, benchmark="colours", model="pruned @ 0.20") == {"scores": 1}
    assert new(stages.score, benchmark="colours", model="tailored @ 0.20") == {"scores": 1}
    assert new(tailor) == {"report": 1}


@pytest.mark.parametrize(
    ("flow", "parameters", "message"),
    [
        (stages.prune, {"ratio": 0.3}, r"ratio: got 0.3; allowed: 0.2 \(pruning.ratios\)"),
        (stages.tune, {"benchmark": "numbers", "ratio": 0.2}, "benchmark: got 'numbers'; allowed: colours"),
        (stages.tune, {"benchmark": "mixture", "ratio": 0.2}, "with tuning.examples 'benchmark'; allowed: mixture"),
        (stages.teach, {"source": "numbers"}, "benchmark: got 'numbers'; allowed: colours"),
        (stages.score, {"benchmark": "colours", "model": "pruned @ 0.30"}, "allowed: dense, or pruned @ 0.20"),
    ],
)
def test_what_the_configuration_does_not_have_is_refused(
    config: RunConfig, flow: Callable[..., Any], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        flow(config, **parameters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"execution": {"dispatch": "gpu"}}, "execution.device: got 'auto'; allowed with execution.dispatch: cpu"),
        (
            {"execution": {"dispatch": "gpu", "device": "cuda"}, "model": {"source": "x", "dtype": "auto"}},
            "model.dtype: got 'auto'; allowed with execution.dispatch: float32",
        ),
        (
            {"execution": {"dispatch": "gpu", "device": "cpu"}, "pruning": {"ratios": [0.2], "steps": 2}},
            "pruning.steps: got 2; allowed with execution.dispatch: 1",
        ),
    ],
)
def test_what_cannot_be_dispatched_is_found_before_any_work(
    own_run: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        preflight_tailor(validate_config(own_run | change))


def test_only_tailor_dispatches(own_run: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"execution.dispatch: got 'gpu'; allowed: in the flow tailor only"):
        preflight(validate_config(own_run | {"execution": {"dispatch": "gpu", "device": "cpu"}}))


def test_a_deployment_that_is_not_there_is_named(own_run: dict[str, Any]) -> None:
    config = validate_config(own_run | {"execution": {"dispatch": "nowhere", "device": "cpu"}})
    with pytest.raises(InputError, match="there is no deployment importance/nowhere"):
        tailor(config)
