"""The candidates of a search, each of which is made, scored and costed: `make → score → cost`."""

import logging
import math
from dataclasses import dataclass, field, replace

from tailored_llama import evaluation, models, serving, training
from tailored_llama.config import SmallestConfig, named_benchmark
from tailored_llama.evaluation import CandidateFigures, FileType, ScoreSettings
from tailored_llama.pipeline import bases, stages, steps
from tailored_llama.pipeline.answers import Labels
from tailored_llama.pipeline.bases import Base, ScoredSplit, Step, Whole
from tailored_llama.pipeline.executor import Executor
from tailored_llama.pipeline.graph import Artifact, Artifacts, Node
from tailored_llama.serving import GgufSettings, QuantisedSettings, SourceSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A base model with something removed, in one type of file; `source` is the user's file as it is.

    `score` adds its scores on the choosing rows, by benchmark, and its times; `cost` adds the figures. `model` is the
    name of the model for people, whatever its file.
    """

    base: Base
    step: Step
    kind: FileType
    model: str
    checkpoint: Artifact
    adapter: Artifact | None
    choosing: Artifacts = field(default_factory=dict)
    timed: Artifact | None = None
    figures: CandidateFigures | None = None

    @property
    def label(self) -> str:
        name = self.base.config.model.short_name
        return f"{name}, the file as it is" if self.kind == "source" else f"{name} {self.step.label}, {self.bits}"

    @property
    def bits(self) -> str:
        return self.kind or "16 bits"

    @property
    def measured(self) -> CandidateFigures:
        """The figures, once it is costed."""
        assert self.figures
        return self.figures


def make(base: Base, step: Step, kind: FileType, whole: Whole) -> Candidate:
    """Prune and tune, or take the whole base model as it is best.

    Where only tokens leave, the layers are those of the whole model, and so is its adapter.
    """
    config, dense = base.config, base.dense.checkpoint
    if kind == "source":
        return Candidate(base, step, kind, f"{config.model.short_name} dense", dense, None)
    if not step.ratio:
        return Candidate(base, step, kind, whole.label, dense, whole.adapter)
    if step.tokens:
        config = config.model_copy(update={"pruning": config.pruning.model_copy(update={"vocabulary": step.tokens})})
    pruned = steps.prune_to(config, base.dense, step.ratio, base.prompts)
    name, adapter = f"{config.model.short_name} {step.label}", whole.adapter
    if step.tokens:
        if adapter:
            adapter = stages.carried(f"adapter of {name}", adapter=adapter, dense=dense, trimmed=pruned)
        return Candidate(base, step, kind, name, pruned, adapter)
    healed = steps.heal_if_asked(config, dense, step.ratio, pruned, base.prompts)
    adapters = steps.tune_adapters(config, step.ratio, healed, base.prompts)
    return Candidate(base, step, kind, name, healed, next(iter(adapters.values()), None))


def score(run: Executor, candidate: Candidate) -> Candidate:
    """Score a candidate on the choosing rows, and time it if time is to be small.

    An adapter of its own that held-out examples show to be no better than none is left out.
    """
    config, step = candidate.base.config, candidate.step
    if step.ratio and not step.tokens and candidate.adapter is not None:
        comparison = training.read_comparison(run.open(candidate.adapter))
        if not training.ships_adapter(config.tuning, comparison):
            candidate = replace(candidate, adapter=None)
    timed = None
    if config.goal.smallest in ("reading", "writing"):
        timed = stages.speed(f"time {candidate.label}", gguf=gguf(candidate))
    return replace(candidate, choosing=scores(candidate, "selection"), timed=timed)


def scores(candidate: Candidate, split: ScoredSplit) -> dict[str, Artifact]:
    """The scores of a candidate on one set of rows of every benchmark, with the weights of its file.

    To prove, llama.cpp itself answers with a GGUF file. To choose, the file's weights are scored in transformers, which
    takes less time, if they can be. Those of a file as it is are in the dense checkpoint, which was made from it.
    """
    config, kind, scored = candidate.base.config, candidate.kind, dict[str, Artifact]()
    for name, prompts in candidate.base.rows[split].items():
        title = f"{candidate.model}, {candidate.bits}, {'to choose' if split == 'selection' else 'to prove'}"
        benchmark = named_benchmark(config, name)
        if kind and split == "evaluation":
            scored[name] = stages.served(
                f"score {name} {title}",
                settings=ScoreSettings.of(benchmark, split),
                checkpoint=candidate.checkpoint,
                gguf=gguf(candidate),
                prompts=prompts,
            )
        elif kind and kind != "source":
            scored[name] = stages.quantised(
                f"score {name} {title}",
                settings=QuantisedSettings.of(benchmark, kind, split),
                checkpoint=candidate.checkpoint,
                gguf=gguf(candidate),
                prompts=prompts,
            )
        else:
            model, adapter = candidate.checkpoint, candidate.adapter
            scored[name] = steps.score(config, name, title, model, prompts, adapter, split)
    return scored


def gguf(candidate: Candidate) -> Node:
    """The GGUF file of a candidate, named as the answer; it is written once, and scored, timed and shipped as it is."""
    base, model, kind = candidate.base, candidate.checkpoint, candidate.kind
    asked, name = base.prompts.of_chat(*base.prompts.evaluation), answer_name(base.config)
    assert kind
    if kind == "source":
        source, title = SourceSettings(base.source, name), f"copy {candidate.model}, the file as it is"
        return stages.source(title, settings=source, checkpoint=model, prompts=asked)
    settings, title = GgufSettings(kind, name), f"write {candidate.model}, {kind}"
    return stages.gguf(title, settings=settings, checkpoint=model, adapter=candidate.adapter, prompts=asked)


def answer_name(config: SmallestConfig) -> str:
    """The name of the answer: that of its benchmarks."""
    return "-".join(benchmark.name.replace(":", "-") for benchmark in config.benchmarks)


def cost(run: Executor, candidate: Candidate, reference: Whole, labels: Labels) -> Candidate:
    """Measure what a scored candidate costs, and what it loses against the reference, as `bases.losses`."""
    base, kind, smallest = candidate.base, candidate.kind, candidate.base.config.goal.smallest
    structure = models.read_structure(run.open(candidate.checkpoint))
    size = 2 * structure.parameters
    if kind == "source":
        size = serving.gguf_file(run.open(gguf(candidate))).stat().st_size
    elif kind:
        size = int(evaluation.read_metrics(run.open(next(iter(candidate.choosing.values()))))["bytes"])
    figure: float = size
    if smallest == "memory":
        figure += models.cache_bytes(structure)
    elif candidate.timed:
        figure = serving.read_speed(run.open(candidate.timed))[smallest]
    figures = CandidateFigures(
        base=base.name,
        ratio=candidate.step.ratio,
        type=kind,
        trimmed=candidate.step.tokens is not None,
        tuned=candidate.adapter is not None,
        parameters=structure.parameters,
        bytes=size,
        cost=figure,
        losses=bases.losses(run, base, reference, candidate.choosing, labels),
        smoothed=math.nan,
    )
    return replace(candidate, figures=figures)


def points_lost(loss: float) -> str:
    """A loss in words; below zero it is a gain."""
    return f"{'loses' if loss > 0 else 'gains'} {100 * abs(loss):.1f} points"
