"""The stages that compute on the run's device, as separate flows.

Each finds or builds the artifacts that its stage needs, then runs the stage. They serve to run one stage of a
configuration alone, and as deployments on the work pool that has the device (`execution.dispatch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from prefect import flow
from pydantic import AfterValidator, Field

from flows._steps import (
    HEALING_TEXT,
    MIXTURE,
    TEXT,
    Dense,
    Prompts,
    heal_if_asked,
    model_label,
    prepare_dense,
    prune_to,
    render_all,
    teach_healing_text,
    teach_shots,
    teach_text,
    teacher_outputs,
    text_of,
    tune_adapter,
)
from tailored_llama.config import RunConfig
from tailored_llama.errors import InputError
from tailored_llama.store import ArtifactRef
from tasks._dispatch import computed_here
from tasks.load_model import load_model
from tasks.perplexity import measure_perplexity
from tasks.profile import profile as profile_model
from tasks.score import score as score_model

# A run's configuration may set `dispatch`, but a stage waiting for its own deployment would hold the pool's only slot.
Config = Annotated[RunConfig, AfterValidator(computed_here)]
Ratio = Annotated[float, Field(gt=0, lt=1, description="One of pruning.ratios.")]
Name = Annotated[str, Field(description="The name of one of the configuration's benchmarks.")]
Trained = Annotated[str, Field(description="A benchmark's name, or mixture if one adapter is tuned on all benchmarks.")]
Source = Annotated[
    str, Field(description=f"A benchmark's name (its shots), {TEXT} (the calibration text), or {HEALING_TEXT}.")
]
Model = Annotated[
    str,
    Field(
        pattern=r"^(dense|(pruned|healed|tailored) @ 0\.\d+)$",
        description="dense (the configured model), or a model made from it: pruned @ 0.20, healed @ 0.20 or "
        "tailored @ 0.20, for example.",
    ),
]


@flow(flow_run_name="importance {config.pruning.criterion}, {config.model.short_name}", persist_result=False)
def importance(config: Config) -> ArtifactRef:
    """Score the coupled groups of the model."""
    return prepare_dense(config, render_all(config)).importance


@flow(flow_run_name="prune @ {ratio:.2f}, {config.model.short_name}", persist_result=False)
def prune(config: Config, ratio: Ratio) -> ArtifactRef:
    """Prune the model to a ratio of all parameters, and reconstruct what remains."""
    _check_ratio(config, ratio)
    return prune_to(config, prepare_dense(config, render_all(config)), ratio)


@flow(flow_run_name="heal @ {ratio:.2f}, {config.model.short_name}", persist_result=False)
def heal(config: Config, ratio: Ratio) -> ArtifactRef:
    """Train a pruned model on plain text towards the dense model's predictions."""
    _check_ratio(config, ratio)
    return _models(config, ratio).healed


@flow(flow_run_name="teach {source}, {config.model.short_name}", persist_result=False)
def teach(config: Config, source: Source) -> ArtifactRef:
    """Record the dense model's predictions on a text or on the shots of a benchmark."""
    prompts = render_all(config)
    dense = prepare_dense(config, prompts)
    if source in (TEXT, HEALING_TEXT):
        return (teach_text if source == TEXT else teach_healing_text)(config, dense, prompts)
    _check_benchmark(config, source)
    return teach_shots(config, dense, prompts, source)


@flow(flow_run_name="tune {benchmark} @ {ratio:.2f}, {config.model.short_name}", persist_result=False)
def tune(config: Config, benchmark: Trained, ratio: Ratio) -> ArtifactRef:
    """Train the adapter of a benchmark at a ratio."""
    _check_ratio(config, ratio)
    if (benchmark == MIXTURE) != (config.tuning.examples == "mixture"):
        raise InputError(
            f"benchmark: got {benchmark!r} with tuning.examples {config.tuning.examples!r}; allowed: {MIXTURE} if and "
            "only if tuning.examples is mixture"
        )
    if benchmark != MIXTURE:
        _check_benchmark(config, benchmark)
    return _adapter_of(config, benchmark, ratio, _models(config, ratio))


@flow(flow_run_name="score {benchmark} {model}, {config.model.short_name}", persist_result=False)
def score(config: Config, benchmark: Name, model: Model = "dense") -> ArtifactRef:
    """Score a model on a benchmark."""
    _check_benchmark(config, benchmark)
    checkpoint, adapter = _checkpoint(config, model, benchmark)
    return score_model(config, benchmark, model, checkpoint, render_all(config).evaluation[benchmark], adapter)


@flow(flow_run_name="perplexity {model}, {config.model.short_name}", persist_result=False)
def perplexity(config: Config, model: Model = "dense") -> ArtifactRef:
    """Measure a model's perplexity on the configured text, without an adapter."""
    cut = None if model == "dense" else text_of(config, load_model(config.store, config.model))
    return measure_perplexity(config, model, _checkpoint(config, model)[0], cut)


@flow(flow_run_name="profile {model}, {config.model.short_name}", persist_result=False)
def profile(config: Config, model: Model) -> ArtifactRef:
    """Time a pruned model compared with the dense one."""
    return profile_model(config, model, _checkpoint(config, model)[0], load_model(config.store, config.model))


@dataclass(frozen=True)
class _Models:
    dense: Dense
    prompts: Prompts
    pruned: ArtifactRef
    healed: ArtifactRef


def _models(config: RunConfig, ratio: float) -> _Models:
    """Build the models of a ratio."""
    prompts = render_all(config)
    dense = prepare_dense(config, prompts)
    pruned = prune_to(config, dense, ratio)
    return _Models(dense, prompts, pruned, heal_if_asked(config, dense, ratio, pruned, prompts))


def _adapter_of(config: RunConfig, benchmark: str, ratio: float, models: _Models) -> ArtifactRef:
    names = [b.name for b in config.benchmarks] if config.tuning.examples == "mixture" else [benchmark]
    teachers = teacher_outputs(config, models.dense, models.prompts, names)
    return tune_adapter(config, names, ratio, models.healed, models.prompts, teachers)


def _checkpoint(config: RunConfig, model: str, benchmark: str | None = None) -> tuple[ArtifactRef, ArtifactRef | None]:
    """A model by its label, and its adapter for a benchmark."""
    if model == "dense":
        return load_model(config.store, config.model), None
    kind = model.split(" ")[0]
    labels = {model_label(kind, ratio): ratio for ratio in config.pruning.ratios}
    if model not in labels:
        raise InputError(f"model: got {model!r}; allowed: dense, or {', '.join(labels)}")
    if kind == "pruned":
        prompts = render_all(config)
        return prune_to(config, prepare_dense(config, prompts), labels[model]), None
    models = _models(config, labels[model])
    if kind == "healed" or benchmark is None or config.tuning.examples == "none":
        return models.healed, None
    return models.healed, _adapter_of(config, benchmark, labels[model], models)


def _check_ratio(config: RunConfig, ratio: float) -> None:
    if ratio not in config.pruning.ratios:
        raise InputError(f"ratio: got {ratio}; allowed: {', '.join(map(str, config.pruning.ratios))} (pruning.ratios)")


def _check_benchmark(config: RunConfig, benchmark: str) -> None:
    names = [b.name for b in config.benchmarks]
    if benchmark not in names:
        raise InputError(f"benchmark: got {benchmark!r}; allowed: {', '.join(names)} (the configured benchmarks)")
