"""The base models that a search starts from: their prompts, and what makes them smaller."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tailored_llama import data, models, pruning, reports
from tailored_llama.config import SmallestConfig
from tailored_llama.errors import InputError, one_line
from tailored_llama.pipeline import steps
from tailored_llama.pipeline.executor import Executor
from tailored_llama.pipeline.graph import Artifacts
from tailored_llama.pipeline.steps import Dense, Prompts

LEAST_STEP = 0.02  # of the parameters, by which neighbours on a ladder differ
WHOLE = (0.9999, 0.999, 0.99)  # of further tokens, that are expected to stay whole where only tokens leave
LEAST_TO_CHOOSE = 10  # labelled rows

ScoredSplit = Literal["selection", "evaluation"]  # the rows to choose with, and those to prove on


@dataclass(frozen=True)
class Step:
    """A place on the ladders of a base model: what is removed; `tokens` that stay, if only tokens leave."""

    ratio: float
    tokens: int | None = None

    @property
    def label(self) -> str:
        return f"trimmed to {self.tokens:,}" if self.tokens else steps.at(self.ratio) if self.ratio else "dense"


@dataclass(frozen=True)
class Base:
    """A base model, ready to be pruned: its run, and its prompts, also those of each set of rows."""

    config: SmallestConfig
    prompts: Prompts
    rows: Mapping[ScoredSplit, Artifacts]  # prompts by benchmark
    dense: Dense
    steps: tuple[Step, ...]  # by size
    unreachable: Mapping[str, str]  # why further ratios are not among them
    is_served: bool = False  # llama.cpp answers to choose, too, since transformers cannot be given a file's weights

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
        if rows < LEAST_TO_CHOOSE:
            raise InputError(
                f"benchmarks.{benchmark.name}: got {rows} labelled rows to choose with, beside those tuned on, "
                f"held out or reported on; allowed: at least {LEAST_TO_CHOOSE}"
            )
        count = min(config.goal.choosing_rows, len(found))
        choosing[benchmark.name] = steps.render(config, benchmark.name, "selection", examples, count)
    unasked = _unasked(config)
    dense = steps.prepare_dense(unasked, prompts)
    for check in steps.checks(unasked, dense, prompts):
        run.result(check)
    rows_of: dict[ScoredSplit, Artifacts] = {"selection": choosing, "evaluation": prompts.evaluation}
    return Base(config, prompts, rows_of, dense, *_steps(run, config, dense))


def foreseen(config: SmallestConfig) -> list[Any]:
    """What a search makes of a base model in any case: prompts, checks, importance, and what tunes it whole."""
    prompts, unasked = steps.render_all(config), _unasked(config)
    dense = steps.prepare_dense(unasked, prompts)
    tuned = steps.tune_adapters(config, 0.0, dense.checkpoint, prompts)
    return [prompts.evaluation, dense, *steps.checks(unasked, dense, prompts), tuned]


def _unasked(config: SmallestConfig) -> SmallestConfig:
    """A search without the ratios that are set, which it tries only if they are reached."""
    return config.model_copy(update={"pruning": config.pruning.model_copy(update={"ratios": ()})})


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
            unreachable[f"{config.model.short_name} {steps.at(ratio)}"] = one_line(error)
        else:
            reached.append(Step(ratio))
    return tuple(reached), unreachable
