"""The candidates for the smallest model: how each is made, and what it costs and loses on the choosing rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tailored_llama import evaluation, models, serving, training
from tailored_llama.config import GgufType, ProfileConfig, SmallestConfig, bases_of
from tailored_llama.errors import one_line
from tailored_llama.evaluation import Answers, Candidate, CandidateParts, Ladder, Measured, ProfileSettings, Rung
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.bases import Base, Model, Step, better_dense, gguf, prepare, read_all, score
from tailored_llama.pipeline.futures import Artifact, Cancelled
from tailored_llama.pipeline.runner import Runner

log = logging.getLogger(__name__)


@dataclass
class SearchState:
    """What is known so far of the candidates of a search, and of the dense model that they are compared with."""

    run: Runner
    config: SmallestConfig
    bases: Sequence[Base]
    ladders: Sequence[tuple[Base, GgufType | None]]
    reference: Model
    answers: Mapping[str, Answers]  # of the reference on the choosing rows, by benchmark
    models: dict[tuple[str, Step], Model]
    parts: dict[Rung, CandidateParts[Artifact]] = field(default_factory=dict)
    candidates: dict[Rung, Candidate] = field(default_factory=dict)  # before smoothing
    failed: dict[str, Exception] = field(default_factory=dict)

    def locate(self, rung: Rung) -> tuple[Base, GgufType | None, Step]:
        """The base model, the type of file and the step of a rung."""
        base, kind = self.ladders[rung.ladder]
        return base, kind, base.steps[rung.position]

    def model(self, rung: Rung) -> Model:
        """The model of a measured rung."""
        base, _, step = self.locate(rung)
        return self.models[base.name, step]

    def label(self, rung: Rung) -> str:
        base, kind, step = self.locate(rung)
        return f"{base.config.model.short_name} {step.label}, {kind or '16 bits'}"


def begin(run: Runner, config: SmallestConfig) -> SearchState:
    """Prepare the base models, and choose the reference: the better of the dense model as it is and tuned.

    The choosing rows decide. Ladders of many bits come first: what loses too much there need not be tried in fewer.
    """
    bases = [prepare(run, own) for own in bases_of(config)]
    dense = [better_dense(run, base) for base in bases]
    ladders = [(base, kind) for kind in sorted(config.file_types, key=serving.bits_of, reverse=True) for base in bases]
    whole = {(base.name, base.steps[0]): model for base, (model, _) in zip(bases, dense, strict=True)}
    return SearchState(run, config, bases, ladders, *dense[0], whole)


def ladders_of(state: SearchState) -> list[Ladder]:
    """The ladders with the cost of every rung, as far as it can be told before the model is made.

    Bytes follow from the parameters, and memory is hardly more. Times cannot be told.
    """
    told = state.config.goal.smallest in ("file", "memory")
    ladders: list[Ladder] = []
    for base, kind in state.ladders:
        structure = models.read_structure(state.run.open(base.dense.checkpoint))
        whole = structure.parameters * serving.bits_of(kind) / 8
        costs = tuple(whole * (1 - step.ratio) if told else 0.0 for step in base.steps)
        above = max((i for i, (other, _) in enumerate(state.ladders[: len(ladders)]) if other is base), default=None)
        reference = base is state.bases[0] and serving.bits_of(kind) >= 16
        ladders.append(Ladder(costs, reference, above))
    return ladders


def measure(state: SearchState, rungs: Sequence[Rung]) -> list[Measured]:
    """Make the candidates of rungs side by side, and measure what they cost and lose on the choosing rows.

    One that cannot be made loses everything.
    """
    phases: list[Callable[[SearchState, Rung, Any], Any]] = [_begin_model, _score, _read]
    done: dict[Rung, Any] = dict.fromkeys(rungs)
    for phase in phases:  # of all, before one is waited for
        for rung in list(done):
            try:
                done[rung] = phase(state, rung, done[rung])
            except Cancelled:
                raise
            except Exception as error:
                log.warning("%s: %s", state.label(rung), one_line(error))
                state.failed[state.label(rung)] = error
                del done[rung]
    return [done.get(rung) or Measured(rung, math.inf, 1.0) for rung in rungs]


def _begin_model(state: SearchState, rung: Rung, nothing: None) -> Model:
    """Prune and tune, or what is known of it already; nothing is waited for."""
    base, _, step = state.locate(rung)
    if known := state.models.get((base.name, step)):
        return known
    run, config = state.run, base.config
    if step.tokens:
        config = config.model_copy(update={"pruning": config.pruning.model_copy(update={"vocabulary": step.tokens})})
    pruned = steps.prune_to(run, config, base.dense, step.ratio, base.prompts)
    healed = steps.heal_if_asked(run, config, base.dense.checkpoint, step.ratio, pruned, base.prompts)
    adapters = steps.tune_adapters(run, config, step.ratio, healed, base.prompts)
    return Model(f"{config.model.short_name} {step.label}", healed, next(iter(adapters.values()), None))


def _score(state: SearchState, rung: Rung, model: Model) -> CandidateParts[Artifact]:
    """Score a candidate on the choosing rows, and time it if time is to be small.

    An adapter that held-out examples show to be no better than none is left out.
    """
    base, kind, step = state.locate(rung)
    if (base.name, step) not in state.models and model.adapter is not None:
        comparison = training.read_comparison(state.run.open(model.adapter))
        if not training.ships_adapter(base.config.tuning, comparison):
            model = replace(model, adapter=None)
    model = state.models.setdefault((base.name, step), model)
    scores, timed = score(state.run, base, model, "selection", kind), None
    if state.config.goal.smallest in ("reading", "writing"):
        name = f"time {state.label(rung)}"
        if kind:
            timed = state.run(stages.SPEED, None, name, gguf=gguf(state.run, base, model, kind))
        else:  # an adapter changes nothing once it is merged
            settings = ProfileSettings.of(ProfileConfig(batches=(1,)), state.config.execution.device)
            timed = state.run(stages.PROFILE, settings, name, checkpoint=model.checkpoint)
    return CandidateParts(state.label(rung), model.checkpoint, model.adapter, scores, timed=timed)


def _read(state: SearchState, rung: Rung, parts: CandidateParts[Artifact]) -> Measured:
    """What a candidate costs, and what it loses on its worst benchmark."""
    base, kind, step = state.locate(rung)
    structure = models.read_structure(state.run.open(parts.checkpoint))
    answers, known = read_all(state.run, base, parts.choosing, "selection"), state.answers
    losses = {name: float(np.mean(known[name].values) - np.mean(own.values)) for name, own in answers.items()}
    size = 2 * structure.parameters
    if kind:
        size = int(evaluation.read_metrics(state.run.open(next(iter(parts.choosing.values()))))["bytes"])
    cost: float = _seconds(state, parts.timed, kind) if parts.timed else size
    if state.config.goal.smallest == "memory":
        cost += models.cache_bytes(structure)
    state.parts[rung] = parts
    state.candidates[rung] = one = Candidate(
        base=base.shown,
        ratio=step.ratio,
        type=kind,
        trimmed=step.tokens is not None,
        tuned=parts.adapter is not None,
        parameters=structure.parameters,
        bytes=size,
        cost=cost,
        losses=losses,
        smoothed=math.nan,
    )
    told = f"{state.label(rung)} {points_lost(one.loss)}"
    log.info("candidate %d: %s, %.1f MB", len(state.candidates), told, size / 1e6)
    return Measured(rung, cost, one.loss)


def points_lost(loss: float) -> str:
    """A loss in words; below zero it is a gain."""
    return f"{'loses' if loss > 0 else 'gains'} {100 * abs(loss):.1f} points"


def _seconds(state: SearchState, timed: Artifact, kind: GgufType | None) -> float:
    """The seconds for a token, of the kind that the goal wants to be small."""
    smallest, folder = state.config.goal.smallest, state.run.open(timed)
    if kind:
        return serving.read_speed(folder)[smallest]
    (row,) = evaluation.read_profile(folder)
    return 1 / (row.prefill_tokens_per_second if smallest == "reading" else row.decode_tokens_per_second)
