"""The base models of a search: prepared, with the rows to choose with and to prove on, and scored on either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tailored_llama import data, models, pruning, reports
from tailored_llama.config import BenchmarkConfig, GgufType, SmallestConfig, named_benchmark
from tailored_llama.errors import InputError, one_line
from tailored_llama.evaluation import Answers
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.futures import Artifact
from tailored_llama.pipeline.reporting import answers_of
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pipeline.steps import Dense, Prompts
from tailored_llama.serving import GgufSettings, QuantisedSettings

ScoredSplit = Literal["selection", "evaluation"]
Scores = Mapping[str, Artifact]  # by benchmark

PURPOSE: dict[ScoredSplit, str] = {"selection": "to choose", "evaluation": "to prove"}
LEAST_STEP = 0.02  # of the parameters, by which neighbours on a ladder differ


@dataclass(frozen=True)
class Step:
    """A place on the ladders of a base model: what is removed; `tokens` that stay, if only tokens leave."""

    ratio: float
    tokens: int | None = None

    @property
    def label(self) -> str:
        return "trimmed" if self.tokens else f"@ {self.ratio:.2f}" if self.ratio else "dense"


@dataclass(frozen=True)
class Base:
    """A base model, ready to be pruned: its run and its prompts, also those of each set of rows, by benchmark."""

    config: SmallestConfig
    prompts: Prompts
    rows: Mapping[ScoredSplit, Mapping[str, Artifact]]
    dense: Dense
    steps: tuple[Step, ...]  # by size
    unreachable: Mapping[str, str]  # why further ratios are not among them

    @property
    def name(self) -> str:
        return self.config.model.source

    @property
    def shown(self) -> str:
        """The name for people, without folders: cards leave this machine."""
        return str(reports.without_folders(self.name))


@dataclass(frozen=True)
class Model:
    """A checkpoint, and the adapter to merge into it, if that is better than none; `label` is for people."""

    label: str
    checkpoint: Artifact
    adapter: Artifact | None


def prepare(run: Runner, config: SmallestConfig) -> Base:
    """Load a base model and score its groups; render all prompts; and see which steps make it smaller.

    Raises:
        InputError: a benchmark has fewer than ten rows to choose with.
    """
    prompts, choosing = steps.render_all(run, config), {}
    for benchmark in config.benchmarks:
        examples = steps.load_examples(run, benchmark)
        count = min(config.goal.choosing_rows, _choosable(run.open(examples), config, benchmark))
        choosing[benchmark.name] = steps.render(run, config, benchmark.name, "selection", examples, count)
    unasked = config.model_copy(update={"pruning": config.pruning.model_copy(update={"ratios": ()})})
    dense = steps.prepare_dense(run, unasked, prompts)
    rows: Mapping[ScoredSplit, Mapping[str, Artifact]] = {"selection": choosing, "evaluation": prompts.evaluation}
    return Base(config, prompts, rows, dense, *_steps(run, config, dense))


def _choosable(examples: Path, config: SmallestConfig, benchmark: BenchmarkConfig) -> int:
    """The rows of a benchmark that are left to choose with."""
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


def better_dense(run: Runner, base: Base) -> tuple[Model, Mapping[str, Answers]]:
    """The dense model as it is or tuned, whichever has more right on the choosing rows; and its answers to these."""
    config, checkpoint = base.config, base.dense.checkpoint
    adapters = steps.tune_adapters(run, config, 0.0, checkpoint, base.prompts)
    label = f"{config.model.short_name} dense"
    candidates = [Model(label, checkpoint, None)]
    candidates += [Model(f"{label}, tuned", checkpoint, adapter) for adapter in list(adapters.values())[:1]]
    scored = [score(run, base, model, "selection") for model in candidates]
    answers = [read_all(run, base, parts, "selection") for parts in scored]
    means = [np.mean([np.mean(own.values) for own in one.values()]) for one in answers]
    best = int(np.argmax(means))
    return candidates[best], answers[best]


def score(run: Runner, base: Base, model: Model, split: ScoredSplit, kind: GgufType | None = None) -> Scores:
    """Score a model on one set of rows of every benchmark, with the weights of a type of file."""
    config, scores = base.config, {}
    for name, prompts in base.rows[split].items():
        benchmark, title = named_benchmark(config, name), f"{model.label}, {kind or '16 bits'}, {PURPOSE[split]}"
        if kind:
            settings = QuantisedSettings.of(benchmark, kind, split)
            inputs = {"checkpoint": model.checkpoint, "gguf": gguf(run, base, model, kind), "prompts": prompts}
            scores[name] = run(stages.QUANTISED, settings, f"score {name} {title}", **inputs)
        else:
            scores[name] = steps.score(run, config, name, title, model.checkpoint, prompts, model.adapter, split)
    return scores


def gguf(run: Runner, base: Base, model: Model, kind: GgufType) -> Artifact:
    """The GGUF file of a model, named as the answer; it is written once, and scored, timed and shipped as it is."""
    settings, title = GgufSettings(kind, answer_name(base.config)), f"write {model.label}, {kind}"
    return run(stages.GGUF_FILE, settings, title, checkpoint=model.checkpoint, adapter=model.adapter)


def answer_name(config: SmallestConfig) -> str:
    """The name of the answer: that of its benchmarks."""
    return "-".join(benchmark.name.replace(":", "-") for benchmark in config.benchmarks)


def read_all(run: Runner, base: Base, scores: Scores, split: ScoredSplit) -> dict[str, Answers]:
    """The answers of a scored model on every benchmark, valued as the goal measures them."""
    prompts = {name: run.open(asked) for name, asked in base.rows[split].items()}
    return {name: answers_of(base.config, name, run.open(own), prompts[name], split) for name, own in scores.items()}
