"""What flows have in common: from a configuration to dense and pruned models, every stage found or built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tailored_llama.config import RunConfig, reads_calibration
from tailored_llama.pruning.prune import step_ratios
from tasks.build_graph import build_graph
from tasks.load_benchmark import load_benchmark
from tasks.load_calibration import load_calibration
from tasks.load_model import load_model
from tasks.prune import prune
from tasks.render_prompts import render_prompts
from tasks.score_importance import score_importance


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts by benchmark."""

    train: dict[str, Any]
    evaluation: dict[str, Any]


@dataclass(frozen=True)
class Dense:
    """The dense model, and what pruning it needs."""

    checkpoint: Any
    groups: Any
    calibration: Any
    importance: Any


def prompts_of(config: RunConfig) -> Prompts:
    """Render the prompts of every benchmark."""
    examples = {b.name: load_benchmark(config.store, b) for b in config.benchmarks}
    train = {name: render_prompts(config, name, "train", found) for name, found in examples.items()}
    evaluation = {name: render_prompts(config, name, "evaluation", found) for name, found in examples.items()}
    return Prompts(train, evaluation)


def dense_of(config: RunConfig, prompts: Prompts) -> Dense:
    """Load the model and score its groups, cheap stages and checks first."""
    dense = load_model(config.store, config.model)
    groups = build_graph(config, dense, config.pruning.ratios)
    calibration = load_calibration(config, dense, prompts.train) if reads_calibration(config) else None
    return Dense(dense, groups, calibration, score_importance(config, dense, calibration, groups))


def pruned_of(config: RunConfig, dense: Dense, ratio: float) -> Any:
    """Prune to a ratio, in as many steps as the configuration says."""
    model, groups, importance = dense.checkpoint, dense.groups, dense.importance
    for step, share in enumerate(step_ratios(ratio, config.pruning.steps)):
        if step:
            groups = build_graph(config, model)
            importance = score_importance(config, model, dense.calibration, groups)
        model = prune(config, share, model, groups, importance, dense.calibration, dense.checkpoint)
    return model
