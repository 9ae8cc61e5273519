"""The candidates for the smallest model: how each is made, and what it costs and loses on the choosing rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from tailored_llama import data, evaluation, models, pruning, serving, training
from tailored_llama.config import BenchmarkConfig, GgufType, ProfileConfig, SmallestConfig, bases_of, named_benchmark
from tailored_llama.errors import InputError, one_line
from tailored_llama.evaluation import Answers, Candidate, CandidateParts, Found, Ladder, Measured, ProfileSettings, Rung
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.runner import Artifact, Cancelled, Runner
from tailored_llama.pipeline.steps import Dense, Lesson, Prompts
from tailored_llama.serving import QuantisedSettings, SpeedSettings

T = TypeVar("T")
ScoredSplit = Literal["selection", "evaluation"]
Scores = Mapping[str, Artifact]  # by benchmark

log = logging.getLogger(__name__)

PURPOSE: dict[ScoredSplit, str] = {"selection": "to choose", "evaluation": "to prove"}
LEAST_STEP = 0.02  # of the parameters, by which neighbours on a ladder differ


@dataclass(frozen=True)
class Step:
    """A place on the ladders of a base model: what is removed; `tokens` that stay, if only tokens leave."""

    ratio: float
    tokens: int | None = None


@dataclass(frozen=True)
class Base:
    """A base model, ready to be pruned: its run, its prompts, those to choose with, and its steps by size."""

    config: SmallestConfig
    prompts: Prompts
    choosing: Mapping[str, Artifact]
    dense: Dense
    steps: tuple[Step, ...]

    @property
    def name(self) -> str:
        return self.config.model.source

    def rows(self, split: ScoredSplit) -> Mapping[str, Artifact]:
        """The prompts to choose with, or those to prove on, by benchmark."""
        return self.choosing if split == "selection" else self.prompts.evaluation


@dataclass(frozen=True)
class Model:
    """A checkpoint, and the adapter to merge into it, if that is better than none; `label` is for people."""

    label: str
    checkpoint: Artifact
    adapter: Artifact | None


@dataclass
class Hunt:
    """What is known so far of the candidates of a search, and of the dense model that they are compared with."""

    run: Runner
    config: SmallestConfig
    bases: Sequence[Base]
    ladders: Sequence[tuple[Base, GgufType | None]]
    reference: Model
    answers: Mapping[str, Answers]  # of the reference on the choosing rows, by benchmark
    made: dict[tuple[str, Step], Model]
    parts: dict[Rung, CandidateParts[Artifact]] = field(default_factory=dict)
    losses: dict[Rung, Mapping[str, float]] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)

    def place(self, rung: Rung) -> tuple[Base, GgufType | None, Step]:
        """The base model, the type of file and the step of a rung."""
        base, kind = self.ladders[rung.ladder]
        return base, kind, base.steps[rung.place]

    def model(self, rung: Rung) -> Model:
        """The model of a measured rung."""
        base, _, step = self.place(rung)
        return self.made[base.name, step]

    def label(self, rung: Rung) -> str:
        base, kind, step = self.place(rung)
        how = "trimmed" if step.tokens else f"@ {step.ratio:.2f}" if step.ratio else "dense"
        return f"{base.config.model.short_name} {how}, {kind or '16 bits'}"


def begin(run: Runner, config: SmallestConfig) -> Hunt:
    """Prepare the base models, and choose the reference: the better of the dense model as it is and tuned.

    The choosing rows decide. Ladders of few bits come first, as their files are the smallest.
    """
    bases = [_prepare(run, own) for own in bases_of(config)]
    dense = [_better_dense(run, base) for base in bases]
    ladders = [(base, kind) for kind in sorted(config.file_types, key=serving.bits_of) for base in bases]
    made = {(base.name, base.steps[0]): model for base, (model, _) in zip(bases, dense, strict=True)}
    return Hunt(run, config, bases, ladders, *dense[0], made)


def ladders_of(hunt: Hunt) -> list[Ladder]:
    """The ladders with the cost of every rung, as far as it can be told before the model is made.

    Bytes follow from the parameters, and memory is hardly more. Times cannot be told.
    """
    told = hunt.config.goal.smallest in ("file", "memory")
    result = []
    for base, kind in hunt.ladders:
        whole = _parameters(hunt, base.dense.checkpoint) * serving.bits_of(kind) / 8
        costs = tuple(whole * (1 - step.ratio) if told else 0.0 for step in base.steps)
        result.append(Ladder(f"{base.name}, {kind}", costs, base is hunt.bases[0] and serving.bits_of(kind) >= 16))
    return result


def measure(hunt: Hunt, rungs: Sequence[Rung]) -> list[Measured]:
    """Make the candidates of rungs side by side, and measure what they cost and lose on the choosing rows.

    One that cannot be made loses everything.
    """
    begun = {rung: done for rung in rungs if (done := _attempt(hunt, rung, _begin_model))}
    chosen = {rung: model for rung, done in begun.items() if (model := _attempt(hunt, rung, _finish_model, done))}
    scored = {rung: parts for rung, model in chosen.items() if (parts := _attempt(hunt, rung, _score, model))}
    found = [_attempt(hunt, rung, _read, scored[rung]) if rung in scored else None for rung in rungs]
    measured = [one or Measured(rung, float("inf"), 1.0) for rung, one in zip(rungs, found, strict=True)]
    for one in measured:
        if one.rung in hunt.losses:
            _tell(hunt, one)
    return measured


def _tell(hunt: Hunt, one: Measured) -> None:
    """Say what a candidate loses, how far the search has come, and which is the smallest so far."""
    margin = hunt.config.goal.lose_at_most / 100
    passing = [rung for rung, losses in hunt.losses.items() if max(losses.values()) <= margin]
    best = min(passing, key=lambda rung: _cost(hunt, rung), default=None)
    log.info(
        "candidate %d, on ladder %d of %d: %s %s, %.1f MB; smallest so far: %s",
        len(hunt.losses),
        one.rung.ladder + 1,
        len(hunt.ladders),
        hunt.label(one.rung),
        points_lost(one.loss),
        file_bytes(hunt, one.rung) / 1e6,
        hunt.label(best) if best else "none",
    )


def points_lost(loss: float) -> str:
    """A loss in words; below zero it is a gain."""
    return f"{'loses' if loss > 0 else 'gains'} {100 * abs(loss):.1f} points"


def _attempt(hunt: Hunt, rung: Rung, function: Callable[..., T], *arguments: object) -> T | None:
    """The value of a function of a rung; None, and a record, if it fails."""
    try:
        return function(hunt, rung, *arguments)
    except Cancelled:
        raise
    except Exception as error:
        log.warning("%s: %s", hunt.label(rung), one_line(error))
        hunt.failed[hunt.label(rung)] = error
        return None


def _prepare(run: Runner, config: SmallestConfig) -> Base:
    """Load a base model and score its groups; render all prompts; and see which steps make it smaller."""
    prompts = steps.render_all(run, config)
    choosing = {}
    for benchmark in config.benchmarks:
        examples = steps.load_examples(run, benchmark)
        rows = min(config.goal.choosing_rows, choosable(run.open(examples), config, benchmark))
        choosing[benchmark.name] = steps.render(run, config, benchmark.name, "selection", examples, rows)
    unasked = config.model_copy(update={"pruning": config.pruning.model_copy(update={"ratios": ()})})
    dense = steps.prepare_dense(run, unasked, prompts)
    return Base(config, prompts, choosing, dense, _steps(run, config, dense))


def choosable(examples: Path, config: SmallestConfig, benchmark: BenchmarkConfig) -> int:
    """The rows of a benchmark that are left to choose with.

    Raises:
        InputError: there are fewer than ten.
    """
    rows = len(data.read_examples(examples, "selection"))
    if not benchmark.data:
        pool = len(data.read_examples(examples, "train")) - config.scoring.num_fewshot
        rows = pool - config.tuning.shots - config.tuning.held_out
    if rows < 10:
        raise InputError(
            f"benchmarks.{benchmark.name}: got {max(rows, 0)} rows to choose with, beside those tuned on, held out or "
            "reported on; allowed: at least 10"
        )
    return rows


def _steps(run: Runner, config: SmallestConfig, dense: Dense) -> tuple[Step, ...]:
    """Nothing removed; only the tokens that the job does not need; and the ratios that remove more."""
    found = [Step(0.0)]
    if dense.counts is not None:
        size = models.read_structure(run.open(dense.checkpoint)).size
        tokens = pruning.enough_tokens(run.open(dense.checkpoint), run.open(dense.counts))
        if (ratio := (size.vocab_size - tokens) * size.row / size.parameters) >= LEAST_STEP:
            found.append(Step(ratio, tokens))
    further = [Step(ratio) for ratio in sorted(config.pruning.ratios) if ratio >= found[-1].ratio + LEAST_STEP]
    return (*found, *further)


def _better_dense(run: Runner, base: Base) -> tuple[Model, Mapping[str, Answers]]:
    """The dense model as it is or tuned, whichever has more right on the choosing rows; and its answers to these."""
    config, checkpoint = base.config, base.dense.checkpoint
    adapters = steps.tune_adapters(run, config, 0.0, checkpoint, Lesson(base.prompts))
    label = f"{config.model.short_name} dense"
    tuned = [Model(f"{label}, tuned", checkpoint, adapter) for adapter in list(adapters.values())[:1]]
    candidates = [Model(label, checkpoint, None), *tuned]
    scored = [score(run, base, model, "selection") for model in candidates]
    answers = [read_all(run, base, parts, "selection") for parts in scored]
    means = [np.mean([np.mean(own.values) for own in one.values()]) for one in answers]
    best = int(np.argmax(means))
    return candidates[best], answers[best]


def _begin_model(hunt: Hunt, rung: Rung) -> Model:
    """Prune and tune, or what is known of it already; nothing is waited for."""
    base, _, step = hunt.place(rung)
    if known := hunt.made.get((base.name, step)):
        return known
    run, config = hunt.run, base.config
    if step.tokens:
        config = config.model_copy(update={"pruning": config.pruning.model_copy(update={"vocabulary": step.tokens})})
    pruned = steps.prune_to(run, config, base.dense, step.ratio)
    healed = steps.heal_if_asked(run, config, base.dense, step.ratio, pruned, base.prompts)
    teachers = steps.teacher_outputs(run, config, base.dense.checkpoint, base.prompts)
    adapters = steps.tune_adapters(run, config, step.ratio, healed, Lesson(base.prompts, teachers))
    how = "trimmed" if step.tokens else f"@ {step.ratio:.2f}"
    return Model(f"{config.model.short_name} {how}", healed, next(iter(adapters.values()), None))


def _finish_model(hunt: Hunt, rung: Rung, model: Model) -> Model:
    """The model without an adapter that held-out examples show to be no better than none."""
    base, _, step = hunt.place(rung)
    if (base.name, step) not in hunt.made:
        if model.adapter is not None:
            comparison = training.read_comparison(hunt.run.open(model.adapter))
            better = training.ships_adapter(base.config.tuning, comparison)
            model = model if better else replace(model, adapter=None)
        hunt.made[base.name, step] = model
    return hunt.made[base.name, step]


def _score(hunt: Hunt, rung: Rung, model: Model) -> CandidateParts[Artifact]:
    """Score a candidate on the choosing rows, and time it if time is to be small."""
    base, kind, _ = hunt.place(rung)
    scores = score(hunt.run, base, model, "selection", kind)
    timed = _time(hunt, rung, model) if hunt.config.goal.smallest in ("reading", "writing") else None
    return CandidateParts(hunt.label(rung), model.checkpoint, model.adapter, scores, timed=timed)


def _time(hunt: Hunt, rung: Rung, model: Model) -> Artifact:
    """Measure how fast a candidate reads and writes; an adapter is merged in, and changes nothing."""
    _, kind, _ = hunt.place(rung)
    name = f"time {hunt.label(rung)}"
    if kind:
        return hunt.run(stages.SPEED, SpeedSettings(kind), name, checkpoint=model.checkpoint)
    settings = ProfileSettings.of(ProfileConfig(batches=(1,)), hunt.config.execution.device)
    return hunt.run(stages.PROFILE, settings, name, checkpoint=model.checkpoint)


def _read(hunt: Hunt, rung: Rung, parts: CandidateParts[Artifact]) -> Measured:
    """What a candidate costs, and what it loses on its worst benchmark."""
    base, _, _ = hunt.place(rung)
    answers = read_all(hunt.run, base, parts.choosing, "selection")
    losses = {name: float(np.mean(hunt.answers[name].values) - np.mean(own.values)) for name, own in answers.items()}
    hunt.parts[rung], hunt.losses[rung] = parts, losses
    return Measured(rung, _cost(hunt, rung), max(losses.values()))


def _cost(hunt: Hunt, rung: Rung) -> float:
    """The cost of a scored candidate in the unit of the goal: bytes, or seconds for a token."""
    parts, smallest = hunt.parts[rung], hunt.config.goal.smallest
    if parts.timed is None:
        cached = models.cache_bytes(models.read_structure(hunt.run.open(parts.checkpoint)))
        return file_bytes(hunt, rung) + (cached if smallest == "memory" else 0)
    folder = hunt.run.open(parts.timed)
    if hunt.place(rung)[1]:
        return serving.read_speed(folder)[smallest]
    (row,) = evaluation.read_profile(folder)
    return 1 / (row.prefill_tokens_per_second if smallest == "reading" else row.decode_tokens_per_second)


def file_bytes(hunt: Hunt, rung: Rung) -> int:
    """The bytes of a candidate's file: of the GGUF file, or two for each weight."""
    parts = hunt.parts[rung]
    if hunt.place(rung)[1]:
        return int(evaluation.read_metrics(hunt.run.open(next(iter(parts.choosing.values()))))["bytes"])
    return 2 * _parameters(hunt, parts.checkpoint)


def candidate_of(hunt: Hunt, rung: Rung, found: Found) -> Candidate:
    """A measured candidate as the answer shows it."""
    base, kind, step = hunt.place(rung)
    parts = hunt.parts[rung]
    return Candidate(
        base=base.name,
        ratio=step.ratio,
        type=kind,
        trimmed=step.tokens is not None,
        tuned=parts.adapter is not None,
        parameters=_parameters(hunt, parts.checkpoint),
        bytes=file_bytes(hunt, rung),
        cost=found.measured[rung].cost,
        losses=hunt.losses[rung],
        smoothed=found.smoothed[rung],
    )


def score(run: Runner, base: Base, model: Model, split: ScoredSplit, kind: GgufType | None = None) -> Scores:
    """Score a model on one set of rows of every benchmark, with the weights of a type of file."""
    config, scores = base.config, {}
    for name, prompts in base.rows(split).items():
        benchmark, title = named_benchmark(config, name), f"{model.label}, {kind or '16 bits'}, {PURPOSE[split]}"
        if kind:
            settings = QuantisedSettings.of(benchmark, kind, split)
            inputs = {"checkpoint": model.checkpoint, "adapter": model.adapter, "prompts": prompts}
            scores[name] = run(stages.QUANTISED, settings, f"score {name} {title}", **inputs)
        else:
            scores[name] = steps.score(run, config, name, title, model.checkpoint, prompts, model.adapter, split)
    return scores


def read_all(run: Runner, base: Base, scores: Scores, split: ScoredSplit) -> dict[str, Answers]:
    """The answers of a scored model on every benchmark, valued as the goal measures them."""
    asked, answers = base.rows(split), {}
    for name, folder in ((name, run.open(own)) for name, own in scores.items()):
        metric = data.headline_metric(named_benchmark(base.config, name))
        measure = base.config.goal.measure
        answers[name] = evaluation.read_measured(folder, metric, measure, run.open(asked[name]), split)
    return answers


def _parameters(hunt: Hunt, checkpoint: Artifact) -> int:
    return models.read_structure(hunt.run.open(checkpoint)).parameters
