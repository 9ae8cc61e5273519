"""The base models that a search starts from: their prompts, what makes them smaller, and how good they are whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from tailored_llama import data, evaluation, models, pruning, reports
from tailored_llama.config import SmallestConfig, named_benchmark
from tailored_llama.errors import InputError, one_line
from tailored_llama.evaluation import Answers, Said
from tailored_llama.pipeline import steps
from tailored_llama.pipeline.answers import Labels, answers_of, label_forms, said_of
from tailored_llama.pipeline.executor import Executor
from tailored_llama.pipeline.graph import Artifact, Artifacts
from tailored_llama.pipeline.steps import Dense, Prompts

LEAST_STEP = 0.02  # of the parameters, by which neighbours on a ladder differ
WHOLE = (0.9999, 0.999)  # of further tokens, that are expected to stay whole where only tokens leave

ScoredSplit = Literal["selection", "evaluation"]  # the rows to choose with, and those to prove on


@dataclass(frozen=True)
class Step:
    """A place on the ladders of a base model: what is removed; `tokens` that stay, if only tokens leave."""

    ratio: float
    tokens: int | None = None

    @property
    def label(self) -> str:
        return f"trimmed to {self.tokens:,}" if self.tokens else f"@ {self.ratio:.2f}" if self.ratio else "dense"


@dataclass(frozen=True)
class Base:
    """A base model, ready to be pruned: its run, and its prompts, also those of each set of rows."""

    config: SmallestConfig
    prompts: Prompts
    rows: Mapping[ScoredSplit, Artifacts]  # prompts by benchmark
    dense: Dense
    steps: tuple[Step, ...]  # by size
    unreachable: Mapping[str, str]  # why further ratios are not among them

    @property
    def name(self) -> str:
        """The name for people, without folders: cards leave this machine."""
        return str(reports.without_folders(self.config.model.source))

    @property
    def given(self) -> str:
        """What the user calls it, which no other base model is called."""
        return self.config.model.source

    @property
    def source(self) -> models.ModelSource:
        return models.find_model(self.config.model)

    def read(self, run: Executor, scores: Artifacts, split: ScoredSplit) -> dict[str, Answers]:
        """The answers of a scored model on every benchmark."""
        asked = self.rows[split]
        return {
            name: answers_of(self.config, name, run.open(own), run.open(asked[name]), split)
            for name, own in scores.items()
        }

    def said(self, run: Executor, scores: Artifacts) -> dict[str, Said]:
        """What a scored model said on the choosing rows of every benchmark, if some of these have no label."""
        asked, config = self.rows["selection"], self.config
        return {
            name: said_of(config, name, run.open(own), run.open(asked[name]), "selection")
            for name, own in scores.items()
            if named_benchmark(config, name).unlabelled
        }


@dataclass(frozen=True)
class Whole:
    """A base model as it is, or tuned: whichever has more right on the choosing rows, with its answers to them.

    `answers` are those to rows with a label. `said` has all answers, if there are rows without one.
    """

    label: str
    adapter: Artifact | None
    scores: Artifacts
    answers: Mapping[str, Answers]
    said: Mapping[str, Said] = field(default_factory=dict)  # by benchmark


def prepare(run: Executor, config: SmallestConfig) -> Base:
    """Load a base model and score its groups; render all prompts; and see which steps make it smaller.

    Raises:
        InputError: a benchmark has fewer than ten rows to choose with; or what `steps.checks` finds.
    """
    prompts, choosing = steps.render_all(config), {}
    for benchmark in config.benchmarks:
        examples = steps.load_examples(benchmark)
        found = data.read_examples(run.open(examples), "selection")
        rows = sum(example.answer != data.UNLABELLED for example in found)
        if not benchmark.data:  # then they are what tuning leaves of the train split
            pool = len(data.read_examples(run.open(examples), "train")) - config.scoring.num_fewshot
            rows = pool - (config.shots_of(benchmark) or 0) - config.tuning.held_out
        if rows < 10:
            raise InputError(
                f"benchmarks.{benchmark.name}: got {max(rows, 0)} labelled rows to choose with, beside those tuned on, "
                "held out or reported on; allowed: at least 10"
            )
        count = min(config.goal.choosing_rows, len(found) or rows)
        choosing[benchmark.name] = steps.render(config, benchmark.name, "selection", examples, count)
    unasked = config.model_copy(update={"pruning": config.pruning.model_copy(update={"ratios": ()})})
    dense = steps.prepare_dense(unasked, prompts)
    for check in steps.checks(unasked, dense, prompts):
        run.result(check)
    rows_of: dict[ScoredSplit, Artifacts] = {"selection": choosing, "evaluation": prompts.evaluation}
    return Base(config, prompts, rows_of, dense, *_steps(run, config, dense))


def _steps(run: Executor, config: SmallestConfig, dense: Dense) -> tuple[tuple[Step, ...], dict[str, str]]:
    """Nothing removed; only tokens that the job hardly needs; and the ratios that remove more.

    Why a ratio cannot be reached comes second.
    """
    reached, unreachable = [Step(0.0)], {}
    if dense.counts is not None:
        size = models.read_structure(run.open(dense.checkpoint)).size
        for whole in WHOLE:
            tokens = pruning.enough_tokens(run.open(dense.checkpoint), run.open(dense.counts), whole)
            ratio = (size.vocab_size - tokens) * size.row / size.parameters
            if ratio >= reached[-1].ratio + LEAST_STEP:
                reached.append(Step(ratio, tokens))
    for ratio in sorted(config.pruning.ratios):
        if ratio < reached[-1].ratio + LEAST_STEP:
            continue
        try:
            run.open(steps.check_ratio(config, dense, ratio))
        except InputError as error:
            unreachable[f"{config.model.short_name} @ {ratio:.2f}"] = one_line(error)
        else:
            reached.append(Step(ratio))
    return tuple(reached), unreachable


def better_whole(run: Executor, base: Base) -> Whole:
    """The base model as it is or tuned, whichever has more right on the choosing rows; if both have as many, tuned."""
    config, checkpoint, label = base.config, base.dense.checkpoint, f"{base.config.model.short_name} dense"
    adapters = steps.tune_adapters(config, 0.0, checkpoint, base.prompts)
    tried: list[Whole] = []
    for name, adapter in {**{f"{label}, tuned": own for own in list(adapters.values())[:1]}, label: None}.items():
        title, asked = f"{name}, 16 bits, to choose", base.rows["selection"]
        scores = {
            of: steps.score(config, of, title, checkpoint, prompts, adapter, "selection")
            for of, prompts in asked.items()
        }
        tried.append(Whole(name, adapter, scores, {}))
    run.begin([whole.scores for whole in tried])
    read = [Whole(own.label, own.adapter, own.scores, base.read(run, own.scores, "selection")) for own in tried]
    best = max(read, key=lambda own: np.mean([np.mean(answers.values) for answers in own.answers.values()]))
    return replace(best, said=base.said(run, best.scores))


def losses(run: Executor, base: Base, reference: Whole, scores: Artifacts, labels: Labels) -> dict[str, float]:
    """What a scored model loses against the reference on the choosing rows of every benchmark, a share.

    `labels` are those of rows that had none.
    """
    said, lost = base.said(run, scores), dict[str, float]()
    for name, own in base.read(run, scores, "selection").items():
        known = reference.answers[name]
        if name not in said:
            lost[name] = float(np.mean(known.values) - np.mean(own.values))
            continue
        pair = evaluation.compare_said(reference.said[name], said[name], label_forms(base.config, name, labels[name]))
        values, labelled = pair.dense.values - pair.small.values, np.isin(pair.dense.examples, known.examples)
        values[labelled] = known.values - own.values
        differs = reference.said[name].answers != said[name].answers
        lost[name] = evaluation.expected_loss(values, differs, pair.missing & ~labelled)
    return lost


def doubt(run: Executor, reference: Whole) -> str:
    """A sentence on the benchmarks on which the reference is not clearly better than without skill."""
    told = []
    for name, known in reference.answers.items():
        folder = run.open(reference.scores[name])
        stated = evaluation.read_metrics(folder)
        metric, floor, rows = stated["metric"], stated["floor"], len(known.examples)
        scored = evaluation.read_answers(folder, metric)
        labelled = scored.values[np.isin(scored.examples, known.examples)]
        value, error = evaluation.metrics({metric: labelled}).values()
        if value - floor < 1.645 * max(error, 1 / rows):  # one-sided, at 95 %
            told.append(f"{value:.2f} in {metric} on {rows} rows of {name}, where {floor:.2f} takes no skill")
    return f"{reference.label} may be too small for this job: it has {' and '.join(told)}." if told else ""
