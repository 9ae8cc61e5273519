"""The stages that compute on the run's device, as flows of their own.

Each finds what stands before it in the store, makes what is missing, and then does its own work: to run one stage of a
configuration alone, and for deployments on the pool that has the device (`execution.dispatch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from prefect import flow
from pydantic import AfterValidator, Field

from flows._models import (
    HEALING_TEXT,
    MIXTURE,
    TEXT,
    Dense,
    adapter_of,
    dense_of,
    healed_of,
    healing_lesson,
    lessons_of,
    named,
    prompts_of,
    pruned_of,
    shots_lesson,
    text_lesson,
)
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tailored_llama.errors import InputError
from tasks._stage import computed_here
from tasks.load_model import load_model
from tasks.perplexity import measure_perplexity
from tasks.profile import profile as profile_model
from tasks.score import score as score_model

# A whole run's may say `dispatch`; but a stage that waits here for its own deployment holds the pool's only slot.
Config = Annotated[RunConfig, AfterValidator(computed_here)]
Ratio = Annotated[float, Field(gt=0, lt=1, description="One of pruning.ratios.")]
Name = Annotated[str, Field(description="The name of one of the configuration's benchmarks.")]
Trained = Annotated[str, Field(description="A benchmark's name; mixture, where one adapter is tuned on all of them.")]
Source = Annotated[
    str, Field(description=f"A benchmark's name, for its shots; {TEXT} (calibration), or {HEALING_TEXT}.")
]
Model = Annotated[
    str,
    Field(
        pattern=r"^(dense|(pruned|healed|tailored) @ 0\.\d+)$",
        description="dense: the model that the configuration names; or one made of it, such as pruned @ 0.20, "
        "healed @ 0.20 or tailored @ 0.20.",
    ),
]


@flow(flow_run_name="importance {config.pruning.criterion}, {config.model.short_name}", persist_result=False)
def importance(config: Config) -> ArtifactRef:
    """Score the coupled groups of the model."""
    return dense_of(config, prompts_of(config)).importance


@flow(flow_run_name="prune @ {ratio:.2f}, {config.model.short_name}", persist_result=False)
def prune(config: Config, ratio: Ratio) -> ArtifactRef:
    """Prune the model to a ratio of all parameters, and fit what stays."""
    _check_ratio(config, ratio)
    return pruned_of(config, dense_of(config, prompts_of(config)), ratio)


@flow(flow_run_name="heal @ {ratio:.2f}, {config.model.short_name}", persist_result=False)
def heal(config: Config, ratio: Ratio) -> ArtifactRef:
    """Train a pruned model on plain text, by what the dense one says of it."""
    _check_ratio(config, ratio)
    return _made(config, ratio).healed


@flow(flow_run_name="teach {source}, {config.model.short_name}", persist_result=False)
def teach(config: Config, source: Source) -> ArtifactRef:
    """Ask the dense model what it would say next, along a text or the shots of a benchmark."""
    prompts = prompts_of(config)
    dense = dense_of(config, prompts)
    if source in (TEXT, HEALING_TEXT):
        return (text_lesson if source == TEXT else healing_lesson)(config, dense, prompts)
    _check_benchmark(config, source)
    return shots_lesson(config, dense, prompts, source)


@flow(flow_run_name="tune {benchmark} @ {ratio:.2f}, {config.model.short_name}", persist_result=False)
def tune(config: Config, benchmark: Trained, ratio: Ratio) -> ArtifactRef:
    """Train the adapter of a benchmark at a ratio."""
    _check_ratio(config, ratio)
    if (benchmark == MIXTURE) != (config.tuning.examples == "mixture"):
        raise InputError(f"benchmark: got {benchmark!r}; not allowed with tuning.examples {config.tuning.examples!r}")
    if benchmark != MIXTURE:
        _check_benchmark(config, benchmark)
    return _adapter(config, benchmark, ratio, _made(config, ratio))


@flow(flow_run_name="score {benchmark} {model}, {config.model.short_name}", persist_result=False)
def score(config: Config, benchmark: Name, model: Model = "dense") -> ArtifactRef:
    """Score a model on a benchmark."""
    _check_benchmark(config, benchmark)
    checkpoint, adapter = _checkpoint(config, model, benchmark)
    return score_model(config, benchmark, model, checkpoint, prompts_of(config).evaluation[benchmark], adapter)


@flow(flow_run_name="perplexity {model}, {config.model.short_name}", persist_result=False)
def perplexity(config: Config, model: Model = "dense") -> ArtifactRef:
    """Measure a model's perplexity on the configuration's text; adapters have none."""
    return measure_perplexity(config, model, _checkpoint(config, model)[0])


@flow(flow_run_name="profile {model}, {config.model.short_name}", persist_result=False)
def profile(config: Config, model: Model) -> ArtifactRef:
    """Time a pruned model beside the dense one."""
    return profile_model(config, model, _checkpoint(config, model)[0], load_model(config.store, config.model))


@dataclass(frozen=True)
class _Made:
    dense: Dense
    prompts: Any
    pruned: Any
    healed: Any


def _made(config: RunConfig, ratio: float) -> _Made:
    """The models of a ratio."""
    prompts = prompts_of(config)
    dense = dense_of(config, prompts)
    pruned = pruned_of(config, dense, ratio)
    return _Made(dense, prompts, pruned, healed_of(config, dense, ratio, pruned, prompts))


def _adapter(config: RunConfig, benchmark: str, ratio: float, made: _Made) -> Any:
    names = [b.name for b in config.benchmarks] if config.tuning.examples == "mixture" else [benchmark]
    lessons = lessons_of(config, made.dense, made.prompts, names)
    return adapter_of(config, names, ratio, made.healed, made.prompts, lessons)


def _checkpoint(config: RunConfig, model: str, benchmark: str | None = None) -> tuple[Any, Any]:
    """A model by its name, and its adapter for a benchmark."""
    if model == "dense":
        return load_model(config.store, config.model), None
    kind = model.split(" ")[0]
    found = {named(kind, ratio): ratio for ratio in config.pruning.ratios}
    if model not in found:
        raise InputError(f"model: got {model!r}; allowed: dense, or {', '.join(found)}")
    if kind == "pruned":
        prompts = prompts_of(config)
        return pruned_of(config, dense_of(config, prompts), found[model]), None
    made = _made(config, found[model])
    if kind == "healed" or benchmark is None or config.tuning.examples == "none":
        return made.healed, None
    return made.healed, _adapter(config, benchmark, found[model], made)


def _check_ratio(config: RunConfig, ratio: float) -> None:
    if ratio not in config.pruning.ratios:
        raise InputError(f"ratio: got {ratio}; allowed: {', '.join(map(str, config.pruning.ratios))}, pruning.ratios")


def _check_benchmark(config: RunConfig, benchmark: str) -> None:
    names = [b.name for b in config.benchmarks]
    if benchmark not in names:
        raise InputError(f"benchmark: got {benchmark!r}; allowed: {', '.join(names)}, the configuration's benchmarks")
