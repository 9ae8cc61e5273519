"""The base models of a search, and the candidates made from them: what each costs, and loses on the choosing rows."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from tailored_llama import data, evaluation, models, pruning, serving, training
from tailored_llama.config import GgufType, ProfileConfig, SmallestConfig, bases_of, named_benchmark
from tailored_llama.errors import InputError, one_line
from tailored_llama.evaluation import Answers, Candidate, CandidateParts, FileType, Measured, ProfileSettings, Rung
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.futures import Artifact, Cancelled
from tailored_llama.pipeline.reporting import answers_of
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pipeline.search_state import Base, Model, ModelKey, OfBenchmarks, ScoredSplit, SearchState, Step
from tailored_llama.pipeline.steps import Dense
from tailored_llama.serving import GgufSettings, QuantisedSettings, ServedSettings, SourceSettings

LEAST_STEP = 0.02  # of the parameters, by which neighbours on a ladder differ

log = logging.getLogger(__name__)


def start_search(run: Runner, config: SmallestConfig) -> SearchState:
    """Prepare the base models, and choose the reference: the better of the dense model as it is and tuned.

    The choosing rows decide. A file that llama.cpp can serve as it is comes first, then ladders of many bits: what
    loses too much there need not be tried in fewer.

    Raises:
        InputError: a benchmark has fewer than ten rows to choose with.
    """
    bases = [_prepare(run, own) for own in bases_of(config)]
    dense = [_better_dense(run, base) for base in bases]
    ladders: list[tuple[Base, FileType]] = []
    if config.goal.runtime == "llama.cpp":
        ladders += [(base, "source") for base in bases if _source(base).kind in ("wheel", "gguf")]
    ladders += [(base, kind) for kind in sorted(config.file_types, key=serving.bits_of, reverse=True) for base in bases]
    whole: dict[ModelKey, Model] = {}
    for base, (better, *_) in zip(bases, dense, strict=True):
        key = base.config.model.source, base.steps[0]
        whole |= {(*key, False): better, (*key, True): replace(better, label=_dense_label(base), adapter=None)}
    reference, answers, scores = dense[0]
    if doubt := _doubt(run, reference, scores):
        log.warning(doubt)
    return SearchState(run, config, bases, ladders, reference, answers, whole, doubt)


def _source(base: Base) -> models.ModelSource:
    return models.find_model(base.config.model)


def _dense_label(base: Base) -> str:
    return f"{base.config.model.short_name} dense"


def _prepare(run: Runner, config: SmallestConfig) -> Base:
    """Load a base model and score its groups; render all prompts; and see which steps make it smaller."""
    prompts, choosing = steps.render_all(run, config), {}
    for benchmark in config.benchmarks:
        examples = steps.load_examples(run, benchmark)
        rows = len(data.read_examples(run.open(examples), "selection"))
        if not benchmark.data:  # then they are what tuning leaves of the train split
            pool = len(data.read_examples(run.open(examples), "train")) - config.scoring.num_fewshot
            rows = pool - (config.shots_of(benchmark) or 0) - config.tuning.held_out
        if rows < 10:
            raise InputError(
                f"benchmarks.{benchmark.name}: got {max(rows, 0)} rows to choose with, beside those tuned on, held out "
                "or reported on; allowed: at least 10"
            )
        count = min(config.goal.choosing_rows, rows)
        choosing[benchmark.name] = steps.render(run, config, benchmark.name, "selection", examples, count)
    unasked = config.model_copy(update={"pruning": config.pruning.model_copy(update={"ratios": ()})})
    dense = steps.prepare_dense(run, unasked, prompts)
    of_rows: dict[ScoredSplit, OfBenchmarks] = {"selection": choosing, "evaluation": prompts.evaluation}
    return Base(config, prompts, of_rows, dense, *_steps(run, config, dense))


def _steps(run: Runner, config: SmallestConfig, dense: Dense) -> tuple[tuple[Step, ...], dict[str, str]]:
    """Nothing removed; only the tokens that the job does not need; and the ratios that remove more.

    Why a ratio cannot be reached comes second.
    """
    reached, unreachable = [Step(0.0)], {}
    if dense.counts is not None:
        size = models.read_structure(run.open(dense.checkpoint)).size
        tokens = pruning.enough_tokens(run.open(dense.checkpoint), run.open(dense.counts))
        if (ratio := (size.vocab_size - tokens) * size.row / size.parameters) >= LEAST_STEP:
            reached.append(Step(ratio, tokens))
    for ratio in sorted(config.pruning.ratios):
        if ratio < reached[-1].ratio + LEAST_STEP:
            continue
        try:
            run.open(steps.check_ratio(run, config, ratio, dense.checkpoint, dense.groups, dense.counts))
        except InputError as error:
            unreachable[f"{config.model.short_name} @ {ratio:.2f}"] = one_line(error)
        else:
            reached.append(Step(ratio))
    return tuple(reached), unreachable


def _better_dense(run: Runner, base: Base) -> tuple[Model, Mapping[str, Answers], OfBenchmarks]:
    """The dense model as it is or tuned, whichever has more right on the choosing rows, with answers and scores."""
    checkpoint, label = base.dense.checkpoint, _dense_label(base)
    adapters = steps.tune_adapters(run, base.config, 0.0, checkpoint, base.prompts)
    dense = [Model(label, checkpoint, None)]
    dense += [Model(f"{label}, tuned", checkpoint, adapter) for adapter in list(adapters.values())[:1]]
    scored = [score(run, base, model, "selection") for model in dense]
    answers = [read_all(run, base, parts, "selection") for parts in scored]
    means = [np.mean([np.mean(own.values) for own in one.values()]) for one in answers]
    best = int(np.argmax(means))
    return dense[best], answers[best], scored[best]


def _doubt(run: Runner, reference: Model, scores: OfBenchmarks) -> str:
    """A sentence on the benchmarks on which the reference is not clearly better than without skill."""
    told = []
    for name, folder in scores.items():
        measured = evaluation.read_metrics(run.open(folder))
        metric, floor = measured["metric"], measured["floor"]
        value, rows = measured[metric], measured["examples"]
        if value - floor < 1.645 * max(measured[f"{metric}_stderr"], 1 / rows):  # one-sided, at 95 %
            told.append(f"{value:.2f} in {metric} on {rows} rows of {name}, where {floor:.2f} takes no skill")
    return f"{reference.label} may be too small for this job: it has {' and '.join(told)}." if told else ""


def score(run: Runner, base: Base, model: Model, split: ScoredSplit, kind: FileType = None) -> OfBenchmarks:
    """Score a model on one set of rows of every benchmark, with the weights of a type of file.

    To prove, llama.cpp itself answers with a GGUF file. To choose, the file's weights are scored in transformers, which
    takes less time. Those of a file as it is are in the dense checkpoint, which was made from it.
    """
    config, scores = base.config, {}
    for name, prompts in base.rows[split].items():
        title = f"{model.label}, {kind or '16 bits'}, {'to choose' if split == 'selection' else 'to prove'}"
        if kind and split == "evaluation":
            served = ServedSettings.of(named_benchmark(config, name), split, config.goal.measure == "probability")
            inputs = {"checkpoint": model.checkpoint, "gguf": gguf(run, base, model, kind), "prompts": prompts}
            scores[name] = run(stages.SERVED, served, f"score {name} {title}", **inputs)
        elif kind and kind != "source":
            settings = QuantisedSettings.of(named_benchmark(config, name), kind, split)
            inputs = {"checkpoint": model.checkpoint, "gguf": gguf(run, base, model, kind), "prompts": prompts}
            scores[name] = run(stages.QUANTISED, settings, f"score {name} {title}", **inputs)
        else:
            scores[name] = steps.score(run, config, name, title, model.checkpoint, prompts, model.adapter, split)
    return scores


def gguf(run: Runner, base: Base, model: Model, kind: GgufType | Literal["source"]) -> Artifact:
    """The GGUF file of a model, named as the answer; it is written once, and scored, timed and shipped as it is."""
    asked = base.prompts.of_chat(*base.prompts.evaluation)
    if kind == "source":
        source, title = (
            SourceSettings(_source(base), answer_name(base.config)),
            f"copy {model.label}, the file as it is",
        )
        return run(stages.SOURCE_FILE, source, title, checkpoint=model.checkpoint, prompts=asked)
    settings, title = GgufSettings(kind, answer_name(base.config)), f"write {model.label}, {kind}"
    return run(stages.GGUF_FILE, settings, title, checkpoint=model.checkpoint, adapter=model.adapter, prompts=asked)


def answer_name(config: SmallestConfig) -> str:
    """The name of the answer: that of its benchmarks."""
    return "-".join(benchmark.name.replace(":", "-") for benchmark in config.benchmarks)


def read_all(run: Runner, base: Base, scores: OfBenchmarks, split: ScoredSplit) -> dict[str, Answers]:
    """The answers of a scored model on every benchmark."""
    prompts = {name: run.open(asked) for name, asked in base.rows[split].items()}
    return {name: answers_of(base.config, name, run.open(own), prompts[name], split) for name, own in scores.items()}


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
    if known := state.models.get(state.model_key(rung)):
        return known
    (base, _, step), run = state.locate(rung), state.run
    config = base.config
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
    base, kind, _ = state.locate(rung)
    if state.model_key(rung) not in state.models and model.adapter is not None:
        comparison = training.read_comparison(state.run.open(model.adapter))
        if not training.ships_adapter(base.config.tuning, comparison):
            model = replace(model, adapter=None)
    model = state.models.setdefault(state.model_key(rung), model)
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
    if kind == "source":
        file = gguf(state.run, base, state.models[state.model_key(rung)], kind)
        size = serving.gguf_file(state.run.open(file)).stat().st_size
    elif kind:
        size = int(evaluation.read_metrics(state.run.open(next(iter(parts.choosing.values()))))["bytes"])
    cost: float = size
    smallest = state.config.goal.smallest
    if smallest == "memory":
        cost += models.cache_bytes(structure)
    elif parts.timed and kind:
        cost = serving.read_speed(state.run.open(parts.timed))[smallest]
    elif parts.timed:
        (row,) = evaluation.read_profile(state.run.open(parts.timed))
        cost = 1 / (row.prefill_tokens_per_second if smallest == "reading" else row.decode_tokens_per_second)
    state.parts[rung] = parts
    state.candidates[rung] = one = Candidate(
        base=base.name,
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
    passing = [own for own, known in state.candidates.items() if known.loss <= state.config.goal.lose_at_most / 100]
    best = min(passing, key=lambda own: state.candidates[own].cost, default=None)
    progress = f"candidate {len(state.candidates)}, on ladder {rung.ladder + 1} of {len(state.ladders)}"
    facts = f"{state.label(rung)} {points_lost(one.loss)}, {size / 1e6:.1f} MB"
    log.info("%s: %s; smallest so far: %s", progress, facts, state.label(best) if best else "none")
    return Measured(rung, cost, one.loss)


def points_lost(loss: float) -> str:
    """A loss in words; below zero it is a gain."""
    return f"{'loses' if loss > 0 else 'gains'} {100 * abs(loss):.1f} points"
