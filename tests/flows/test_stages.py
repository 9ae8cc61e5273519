"""Stages as flows of their own make what the whole pipeline then finds, and refuse what is not in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flows.tailor import tailor
from tasks._task import IncompleteRun

from flows import stages
from tailored_llama.config import PromptStudyConfig, RunConfig, validate_config
from tailored_llama.errors import InputError
from tailored_llama.preflight import preflight_prompts, preflight_tailor


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


def test_a_device_that_each_machine_would_choose_is_refused_before_any_work(own_run: dict[str, Any]) -> None:
    message = "execution.device: got 'auto'; allowed with execution.dispatch: cpu"
    with pytest.raises(InputError, match=message):
        preflight_tailor(validate_config(own_run | {"execution": {"dispatch": "gpu"}}))


def test_a_prompt_study_does_not_dispatch(own_run: dict[str, Any]) -> None:
    study = PromptStudyConfig.model_validate(own_run | {"execution": {"dispatch": "gpu", "device": "cpu"}})
    with pytest.raises(InputError, match=r"execution.dispatch: got 'gpu'; allowed: in the flows tailor, sweep and tr"):
        preflight_prompts(study)


def test_a_deployment_that_is_not_there_is_named(own_run: dict[str, Any]) -> None:
    config = validate_config(own_run | {"execution": {"dispatch": "nowhere", "device": "cpu"}})
    with pytest.raises(IncompleteRun, match="there is no deployment stage/nowhere") as ended:
        tailor(config)
    assert set(ended.value.failed) == {"importance taylor_gate", "score colours dense", "perplexity dense"}
    assert ended.value.report is None
