"""What flows have in common: from a configuration to dense, pruned, healed and tuned models, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tailored_llama.config import RunConfig, reads_calibration
from tailored_llama.healing import healing_text
from tailored_llama.prompt_study import candidates
from tailored_llama.prompts import PromptSplit
from tailored_llama.pruning.prune import step_ratios
from tailored_llama.templates import GENERIC, worded
from tasks.build_graph import build_graph
from tasks.heal import heal
from tasks.load_benchmark import load_benchmark
from tasks.load_calibration import load_calibration
from tasks.load_model import load_model
from tasks.prompt_study import choose_template
from tasks.prune import prune
from tasks.render_prompts import render_prompts
from tasks.score import score
from tasks.score_importance import score_importance
from tasks.teach import teach
from tasks.tune import tune

MIXTURE = "mixture"  # what an adapter is called that was tuned on all benchmarks at once
TEXT, HEALING_TEXT = "text", "text for healing"  # what the dense model is asked along, beside the shots


def named(model: str, ratio: float) -> str:
    """What a model of a run is called: pruned @ 0.20."""
    return f"{model} @ {ratio:.2f}" if round(ratio, 2) == ratio else f"{model} @ {ratio}"


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts by benchmark.

    `train` are the run's own, which may be its calibration text; `shots` what is tuned on, worded otherwise where one
    adapter is tuned on all benchmarks; `templates` the sets that were searched for.
    """

    train: dict[str, Any]
    shots: dict[str, Any]
    evaluation: dict[str, Any]
    templates: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dense:
    """The dense model, and what pruning it needs."""

    checkpoint: Any
    groups: Any
    calibration: Any
    importance: Any


def prompts_of(config: RunConfig) -> Prompts:
    """Render the prompts of every benchmark; where all are tuned on at once, their shots by one generic template."""
    examples = {b.name: load_benchmark(config.store, b) for b in config.benchmarks}
    train = {name: render_prompts(config, name, "train", found) for name, found in examples.items()}
    shots = train
    if config.tuning.examples == "mixture":
        shots = {name: render_prompts(worded(config, GENERIC), name, "train", e) for name, e in examples.items()}
    evaluation = {name: render_prompts(config, name, "evaluation", found) for name, found in examples.items()}
    return Prompts(train, shots, evaluation)


def searched_prompts(config: RunConfig, model: Any) -> Prompts:
    """The prompts of every benchmark by the shipped template set that a model does best with on the train examples.

    That is the shots and the held-out ones, all that tuning may look at.
    """
    train, evaluation, chosen = {}, {}, {}
    splits: list[PromptSplit] = ["shots", "held_out"] if config.tuning.held_out else ["shots"]
    for benchmark in config.benchmarks:
        name, examples = benchmark.name, load_benchmark(config.store, benchmark)
        rendered = {
            template: render_prompts(worded(config, template), name, "train", examples)
            for template in candidates((), benchmark)
        }
        scores = {
            template: [score(config, name, f"{template}, {split}", model, asked, split=split) for split in splits]
            for template, asked in rendered.items()
        }
        chosen[name] = choose_template(config.store, name, scores)
        train[name] = rendered[chosen[name]]
        evaluation[name] = render_prompts(worded(config, chosen[name]), name, "evaluation", examples)
    return Prompts(train, train, evaluation, chosen)


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


def healed_of(config: RunConfig, dense: Dense, ratio: float, pruned: Any, prompts: Prompts) -> Any:
    """The pruned model after healing, or as it is where the configuration has none."""
    if not config.healing.tokens:
        return pruned
    return heal(config, ratio, pruned, healing_lesson(config, dense, prompts))


@dataclass(frozen=True)
class Lessons:
    """What the dense model says along the shots, by benchmark, and along the calibration text."""

    shots: dict[str, Any]
    text: Any


def lessons_of(config: RunConfig, dense: Dense, prompts: Prompts, names: Sequence[str]) -> Lessons:
    """What tuning on some benchmarks learns of the dense model: nothing, where the configuration gives it no weight."""
    if not config.distillation.weight or config.tuning.examples == "none":
        return Lessons({}, None)
    shots = {name: shots_lesson(config, dense, prompts, name) for name in names}
    return Lessons(shots, text_lesson(config, dense, prompts) if config.distillation.sequences else None)


def shots_lesson(config: RunConfig, dense: Dense, prompts: Prompts, benchmark: str) -> Any:
    return teach(config, benchmark, dense.checkpoint, prompts.shots[benchmark])


def text_lesson(config: RunConfig, dense: Dense, prompts: Prompts) -> Any:
    calibration = dense.calibration or load_calibration(config, dense.checkpoint, prompts.train)
    return teach(config, TEXT, dense.checkpoint, calibration)


def healing_lesson(config: RunConfig, dense: Dense, prompts: Prompts) -> Any:
    text = load_calibration(healing_text(config), dense.checkpoint, prompts.train)
    return teach(config, HEALING_TEXT, dense.checkpoint, text)


def adapter_of(
    config: RunConfig, names: Sequence[str], ratio: float, base: Any, prompts: Prompts, lessons: Lessons
) -> Any:
    """One adapter for some benchmarks."""
    label = names[0] if len(names) == 1 else MIXTURE
    shots = {name: prompts.shots[name] for name in names}
    teachers = {name: lessons.shots[name] for name in names if lessons.shots}
    return tune(config, label, ratio, base, shots, teachers, lessons.text)


def adapters_of(config: RunConfig, dense: Dense, ratio: float, base: Any, prompts: Prompts) -> dict[str, Any]:
    """The adapter of every benchmark: its own, the same for all, or (an empty mapping) none."""
    names = list(prompts.train)
    lessons = lessons_of(config, dense, prompts, names)
    if config.tuning.examples == "none":
        return {}
    if config.tuning.examples == "mixture":
        return dict.fromkeys(names, adapter_of(config, names, ratio, base, prompts, lessons))
    return {name: adapter_of(config, [name], ratio, base, prompts, lessons) for name in names}
