"""What flows share: the steps from a configuration to its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tailored_llama.config import (
    GENERIC,
    TUNED_DENSE,
    RunConfig,
    healing_text,
    reads_calibration,
    reads_train,
    step_ratios,
    trims_vocabulary,
    with_template,
)
from tailored_llama.store import ArtifactRef
from tasks._results import MeasuredModel, TunedDense
from tasks.build_graph import build_graph
from tasks.count_tokens import count_tokens
from tasks.heal import heal
from tasks.load_benchmark import load_benchmark
from tasks.load_calibration import load_calibration
from tasks.load_model import load_model
from tasks.perplexity import measure_perplexity
from tasks.prompt_study import candidates, choose_template
from tasks.prune import prune
from tasks.render_prompts import render_chosen, render_prompts
from tasks.score import score
from tasks.score_importance import score_importance
from tasks.teach import teach
from tasks.tune import tune

MIXTURE = "mixture"  # names the adapter that is tuned on all benchmarks at once
TEXT, HEALING_TEXT = "text", "text for healing"  # sources of teacher outputs, besides the shots


def model_label(model: str, ratio: float) -> str:
    """The label of a run's model, such as pruned @ 0.20."""
    return f"{model} @ {ratio:.2f}" if round(ratio, 2) == ratio else f"{model} @ {ratio}"


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts by benchmark.

    `train` are the run's own train prompts, which may serve as calibration text. `shots` are the prompts to tune on,
    worded differently if one adapter is tuned on all benchmarks. `templates` are the sets that a search chose.
    """

    train: Mapping[str, ArtifactRef] = field(default_factory=dict)
    shots: Mapping[str, ArtifactRef] = field(default_factory=dict)
    evaluation: Mapping[str, ArtifactRef] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dense:
    """The dense model, and the artifacts for pruning it.

    `counts` of tokens are only there for the kind vocabulary.
    """

    checkpoint: ArtifactRef
    groups: ArtifactRef
    calibration: ArtifactRef | None
    importance: ArtifactRef
    counts: ArtifactRef | None = None


def render_all(config: RunConfig) -> Prompts:
    """Render the prompts of every benchmark; the shots of a mixture use the generic template."""
    examples = {b.name: load_benchmark(config.store, b) for b in config.benchmarks}
    read = {name: table for name, table in examples.items() if reads_train(config, name)}
    train = {name: render_prompts(config, name, "train", table) for name, table in read.items()}
    shots = train
    if config.tuning.examples == "mixture":
        generic = with_template(config, GENERIC)
        shots = {name: render_prompts(generic, name, "train", table) for name, table in examples.items()}
    evaluation = {name: render_prompts(config, name, "evaluation", table) for name, table in examples.items()}
    return Prompts(train, shots, evaluation)


def search_templates(config: RunConfig, model: ArtifactRef) -> Prompts:
    """Render every benchmark with the shipped template set that a model does best with on train examples.

    These are the shots and the held-out examples, all that tuning may see.
    """
    train, evaluation, chosen = {}, {}, {}
    splits: list[Literal["shots", "held_out"]] = ["shots", "held_out"] if config.tuning.held_out else ["shots"]
    for benchmark in config.benchmarks:
        name, examples = benchmark.name, load_benchmark(config.store, benchmark)
        rendered = {
            template: render_prompts(with_template(config, template), name, "train", examples)
            for template in candidates((), benchmark)
        }
        scores = {
            template: [score(config, name, f"{template}, {split}", model, prompts, split=split) for split in splits]
            for template, prompts in rendered.items()
        }
        chosen[name] = choose_template(config.store, name, scores)
        train[name] = render_chosen(config, name, "train", examples, chosen[name])
        evaluation[name] = render_chosen(config, name, "evaluation", examples, chosen[name])
    return Prompts(train, train, evaluation, chosen)


def prepare_dense(config: RunConfig, prompts: Prompts) -> Dense:
    """Load the model and score its groups; cheap stages and checks come first."""
    dense = load_model(config.store, config.model)
    counts = count_tokens(config, dense, _train_prompts(prompts)) if trims_vocabulary(config) else None
    groups = build_graph(config, dense, config.pruning.ratios, counts)
    calibration = load_calibration(config, dense, prompts.train) if reads_calibration(config) else None
    if config.healing.tokens and config.healing.source:
        _calibration_text(healing_text(config), dense, prompts)  # a text that cannot be read ends the run here
    importance = score_importance(config, dense, groups, calibration)
    return Dense(dense, groups, calibration, importance, counts)


def _train_prompts(prompts: Prompts) -> dict[str, ArtifactRef]:
    """All train prompts of a run, those of a mixture in both wordings."""
    mixed = {f"{name}, shots": ref for name, ref in prompts.shots.items() if ref != prompts.train[name]}
    return {**prompts.train, **mixed}


def prune_to(config: RunConfig, dense: Dense, ratio: float) -> ArtifactRef:
    """Prune to a ratio, in the configured number of steps."""
    model, groups, importance = dense.checkpoint, dense.groups, dense.importance
    for step, share in enumerate(step_ratios(ratio, config.pruning.steps)):
        if step:
            groups = build_graph(config, model)
            importance = score_importance(config, model, groups, dense.calibration)
        model = prune(config, share, model, groups, importance, dense.calibration, dense.checkpoint, dense.counts)
    return model


def text_of(config: RunConfig, dense: ArtifactRef) -> ArtifactRef | None:
    """The model whose tokens cut the text of a pruned model's perplexity; None: its own do."""
    return dense if trims_vocabulary(config) else None


def heal_if_asked(config: RunConfig, dense: Dense, ratio: float, pruned: ArtifactRef, prompts: Prompts) -> ArtifactRef:
    """The healed model, or the pruned one if healing is not configured."""
    if not config.healing.tokens:
        return pruned
    return heal(config, ratio, pruned, teach_healing_text(config, dense, prompts))


@dataclass(frozen=True)
class TeacherOutputs:
    """Teacher outputs on the shots, by benchmark, and on the calibration text."""

    shots: Mapping[str, ArtifactRef]
    text: ArtifactRef | None


def teacher_outputs(config: RunConfig, dense: Dense, prompts: Prompts, names: Sequence[str]) -> TeacherOutputs:
    """What the dense model says for tuning on benchmarks; nothing if it is not asked or nothing is tuned."""
    if not config.distillation.weight or config.tuning.examples == "none":
        return TeacherOutputs({}, None)
    shots = {name: teach_shots(config, dense, prompts, name) for name in names}
    text = teach_text(config, dense, prompts) if config.distillation.sequences else None
    return TeacherOutputs(shots, text)


def teach_shots(config: RunConfig, dense: Dense, prompts: Prompts, benchmark: str) -> ArtifactRef:
    return teach(config, benchmark, dense.checkpoint, prompts.shots[benchmark])


def teach_text(config: RunConfig, dense: Dense, prompts: Prompts) -> ArtifactRef:
    text = dense.calibration or _calibration_text(config, dense.checkpoint, prompts)
    return teach(config, TEXT, dense.checkpoint, text)


def teach_healing_text(config: RunConfig, dense: Dense, prompts: Prompts) -> ArtifactRef:
    text = _calibration_text(healing_text(config), dense.checkpoint, prompts)
    return teach(config, HEALING_TEXT, dense.checkpoint, text)


def _calibration_text(config: RunConfig, dense: ArtifactRef, prompts: Prompts) -> ArtifactRef:
    return load_calibration(config, dense, prompts.train)


def tune_adapter(
    config: RunConfig, names: Sequence[str], ratio: float, base: ArtifactRef, prompts: Prompts, teachers: TeacherOutputs
) -> ArtifactRef:
    """Tune one adapter for one or several benchmarks."""
    label = names[0] if len(names) == 1 else MIXTURE
    shots = {name: prompts.shots[name] for name in names}
    taught = {name: teachers.shots[name] for name in names if teachers.shots}
    return tune(config, label, ratio, base, shots, taught, teachers.text)


def tune_adapters(
    config: RunConfig, dense: Dense, ratio: float, base: ArtifactRef, prompts: Prompts
) -> dict[str, ArtifactRef]:
    """Tune the adapter of every benchmark: its own, the same for all, or (an empty mapping) none."""
    teachers = teacher_outputs(config, dense, prompts, list(prompts.train))
    return _adapters(config, ratio, base, prompts, teachers)


def _adapters(
    config: RunConfig, ratio: float, base: ArtifactRef, prompts: Prompts, teachers: TeacherOutputs
) -> dict[str, ArtifactRef]:
    names = list(prompts.train)
    if config.tuning.examples == "none":
        return {}
    if config.tuning.examples == "mixture":
        return dict.fromkeys(names, tune_adapter(config, names, ratio, base, prompts, teachers))
    return {name: tune_adapter(config, [name], ratio, base, prompts, teachers) for name in names}


def tune_dense(config: RunConfig, dense: ArtifactRef, prompts: Prompts) -> TunedDense:
    """Tune the dense model on the same shots as the pruned ones, and score it.

    It is neither healed nor distilled: nothing was removed, and it would be its own teacher.
    """
    adapters = _adapters(config, 0.0, dense, prompts, TeacherOutputs({}, None))
    scores = {
        name: score(config, name, TUNED_DENSE, dense, prompts.evaluation[name], adapter)
        for name, adapter in adapters.items()
    }
    return TunedDense(by_training(config, adapters), scores)


def by_training(config: RunConfig, adapters: Mapping[str, ArtifactRef]) -> dict[str, ArtifactRef]:
    """The adapters of the benchmarks, by what they were trained on: a mixture has only one."""
    return {MIXTURE: next(iter(adapters.values()))} if config.tuning.examples == "mixture" else dict(adapters)


def measure(
    config: RunConfig,
    label: str,
    checkpoint: ArtifactRef,
    prompts: Prompts,
    names: Sequence[str] = (),
    text_of: ArtifactRef | None = None,
) -> MeasuredModel:
    """Measure a model without an adapter: its perplexity, and its scores on the named benchmarks.

    `text_of` is the dense model if the vocabulary was trimmed: perplexity is then of the text that its tokens cut.
    """
    perplexity = measure_perplexity(config, label, checkpoint, text_of)
    scores = {name: score(config, name, label, checkpoint, prompts.evaluation[name]) for name in names}
    return MeasuredModel(checkpoint, perplexity, scores)
