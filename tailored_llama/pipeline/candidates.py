"""The candidates of a search, each of which is made, scored and costed: `make → score → cost`."""

import logging
import math
from dataclasses import dataclass, field, replace

import numpy as np

from tailored_llama import evaluation, models, serving, training
from tailored_llama.config import SmallestConfig, named_benchmark
from tailored_llama.evaluation import Answers, CandidateFigures, FileType, Said, ScoreSettings
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.answers import Labels, answers_of, label_forms, said_of
from tailored_llama.pipeline.bases import Base, ScoredSplit, Step
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

    def read(self, run: Executor) -> dict[str, Answers]:
        """Its answers to the choosing rows with a label, by benchmark."""
        config, asked = self.base.config, self.base.rows["selection"]
        return {
            name: answers_of(config, name, run.open(own), run.open(asked[name]), "selection")
            for name, own in self.choosing.items()
        }

    def said(self, run: Executor) -> dict[str, Said]:
        """What it said on the choosing rows of every benchmark, if some of these have no label."""
        config, asked = self.base.config, self.base.rows["selection"]
        return {
            name: said_of(config, name, run.open(own), run.open(asked[name]), "selection")
            for name, own in self.choosing.items()
            if named_benchmark(config, name).unlabelled
        }


def better_whole(run: Executor, base: Base) -> Candidate:
    """The base model as it is or tuned, whichever has more right on the choosing rows; if both have as many, tuned."""
    name, dense = f"{base.config.model.short_name} dense", base.dense.checkpoint
    tuned = list(steps.tune_adapters(base.config, 0.0, dense, base.prompts).values())[:1]
    adapters = {**{f"{name}, tuned": own for own in tuned}, name: None}
    tried = [Candidate(base, base.steps[0], None, model, dense, adapter) for model, adapter in adapters.items()]
    tried = [replace(own, choosing=scores(own, "selection")) for own in tried]
    run.begin([own.choosing for own in tried])
    right = [np.mean([np.mean(answers.values) for answers in own.read(run).values()]) for own in tried]
    return tried[int(np.argmax(right))]


def make(base: Base, step: Step, kind: FileType, whole: Candidate) -> Candidate:
    """Prune and tune, or take the whole base model as it is best.

    Where only tokens leave, the layers are those of the whole model, and so is its adapter.
    """
    config, dense = base.config, base.dense.checkpoint
    if kind == "source":
        return Candidate(base, step, kind, f"{config.model.short_name} dense", dense, None)
    if not step.ratio:
        return replace(whole, kind=kind)
    if step.tokens:
        config = config.model_copy(update={"pruning": config.pruning.model_copy(update={"vocabulary": step.tokens})})
    pruned = steps.prune_to(config, base.dense, step.ratio, base.prompts)
    name, adapter = f"{config.model.short_name} {step.label}", whole.adapter
    if step.tokens:
        if adapter:
            adapter = stages.carried(f"adapter of {name}", adapter=adapter, dense=dense, trimmed=pruned)
        return Candidate(base, step, kind, name, pruned, adapter)
    adapters = steps.tune_adapters(config, step.ratio, pruned, base.prompts)
    return Candidate(base, step, kind, name, pruned, next(iter(adapters.values()), None))


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

    The goal and the split alone decide how a candidate is asked, so that all are asked alike, and the reference too. To
    prove for llama.cpp, it answers itself. To choose, weights are scored in transformers, which takes less time, if
    those of all files can be. Those of a file as it is are in the dense checkpoint, which was made from it.
    """
    config, kind, scored = candidate.base.config, candidate.kind, dict[str, Artifact]()
    is_served = config.goal.runtime == "llama.cpp" and (split == "evaluation" or candidate.base.is_served)
    for name, prompts in candidate.base.rows[split].items():
        title = f"{candidate.model}, {candidate.bits}, {'to choose' if split == 'selection' else 'to prove'}"
        benchmark = named_benchmark(config, name)
        if is_served:
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
    """The GGUF file of a candidate, named as the answer; it is written once, and scored, timed and shipped as it is.

    The file of a reference has 16 bits, and is scored alone.
    """
    base, model = candidate.base, candidate.checkpoint
    kind = candidate.kind or serving.whole_type(base.source)
    asked, name = base.prompts.of_chat(*base.prompts.evaluation), answer_name(base.config)
    if kind == "source":
        source, title = SourceSettings(base.source, name), f"copy {candidate.model}, the file as it is"
        return stages.source(title, settings=source, checkpoint=model, prompts=asked)
    settings, title = GgufSettings(kind, name), f"write {candidate.model}, {kind}"
    return stages.gguf(title, settings=settings, checkpoint=model, adapter=candidate.adapter, prompts=asked)


def answer_name(config: SmallestConfig) -> str:
    """The name of the answer: that of its benchmarks."""
    return "-".join(benchmark.name.replace(":", "-") for benchmark in config.benchmarks)


def cost(run: Executor, candidate: Candidate, reference: Candidate, labels: Labels) -> Candidate:
    """Measure what a scored candidate costs, and what it loses against the reference, as `losses`."""
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
        losses=losses(run, candidate, reference, labels),
        smoothed=math.nan,
    )
    return replace(candidate, figures=figures)


def losses(run: Executor, candidate: Candidate, reference: Candidate, labels: Labels) -> dict[str, float]:
    """What a scored candidate loses against the reference on the choosing rows of every benchmark, a share.

    `labels` are those of rows that had none.
    """
    first, said, before, lost = reference.said(run), candidate.said(run), reference.read(run), dict[str, float]()
    for name, own in candidate.read(run).items():
        evaluation.check_alike(run.open(reference.choosing[name]), run.open(candidate.choosing[name]))
        known = before[name]
        if name not in said:
            lost[name] = float(np.mean(known.values) - np.mean(own.values))
            continue
        forms = label_forms(candidate.base.config, name, labels[name])
        pair = evaluation.compare_said(first[name], said[name], forms)
        values, labelled = pair.dense.values - pair.small.values, np.isin(pair.dense.examples, known.examples)
        values[labelled] = known.values - own.values
        differs = first[name].answers != said[name].answers
        lost[name] = evaluation.expected_loss(values, differs, pair.missing & ~labelled)
    return lost


def doubt(run: Executor, reference: Candidate) -> str:
    """A sentence on the benchmarks on which the reference is not clearly better than without skill."""
    told = []
    for name, known in reference.read(run).items():
        stated = evaluation.read_metrics(run.open(reference.choosing[name]))
        metric, floor, rows = stated["metric"], stated["floor"], len(known.examples)
        value, error = evaluation.metrics({metric: known.values}).values()
        if value - floor < 1.645 * max(error, 1 / rows):  # one-sided, at 95 %
            told.append(f"{value:.2f} in {metric} on {rows} rows of {name}, where {floor:.2f} takes no skill")
    return f"{reference.model} may be too small for this job: it has {' and '.join(told)}." if told else ""
