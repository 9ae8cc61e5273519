"""The steps from a configuration to its models, as plain calls of stages."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tailored_llama import data
from tailored_llama.config import (
    PROMPTS,
    TUNED_DENSE,
    BenchmarkConfig,
    RunConfig,
    SmallestConfig,
    asks_turns,
    is_written,
    named_benchmark,
    new_tokens,
    reads_calibration,
    scores_by_text,
    trims_vocabulary,
)
from tailored_llama.evaluation import MeasuredModel, PerplexitySettings, ScoreSettings, TunedDense
from tailored_llama.models import DenseSettings
from tailored_llama.pipeline import stages
from tailored_llama.pipeline.graph import Artifact, Artifacts, Node, nodes_in
from tailored_llama.pruning import CountSettings, ImportanceSettings, PruneSettings, SplitSettings
from tailored_llama.training import TuneSettings

MIXTURE = "mixture"  # names the adapter that is tuned on all benchmarks at once


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts by benchmark.

    `train` are the prompts to tune on, which may serve as calibration text.
    """

    train: Artifacts = field(default_factory=dict)
    evaluation: Artifacts = field(default_factory=dict)

    def of_chat(self, *benchmarks: str) -> dict[str, Artifact]:
        """The prompts that a chat with a model of these benchmarks has to ask; none if one has no train prompts."""
        return {name: self.train[name] for name in benchmarks} if self.train.keys() >= {*benchmarks} else {}


@dataclass(frozen=True)
class Dense:
    """The dense model, and the artifacts for pruning it; for the kind vocabulary with the `counts` of its tokens."""

    checkpoint: Artifact
    groups: Artifact
    calibration: Artifact | None
    importance: Artifact
    counts: Artifact | None


def digits(ratio: float) -> str:
    """What names a ratio: two digits, or all six that tell it from others."""
    short = f"{ratio:.2f}"
    return short if float(short) == ratio else f"{ratio:g}"


def at(ratio: float) -> str:
    """The end of the name of what is made at a ratio."""
    return f"@ {digits(ratio)}"


def load_examples(benchmark: BenchmarkConfig) -> Node:
    """Load all examples of a benchmark."""
    return stages.examples(f"load {benchmark.name}", settings=data.BenchmarkSource(benchmark))


def render(
    config: RunConfig,
    benchmark: str,
    split: data.Split,
    examples: Artifact,
    selection: int = 0,
    dense: Artifact | None = None,
) -> Node:
    """Render one split of a benchmark; `selection` is the number of train examples in the split of that name.

    `dense` has the chat template that may ask; by default the run's model.
    """
    own, name = named_benchmark(config, benchmark), f"render {benchmark} {split} {config.prompts.template}"
    settings = data.PromptSettings.of(config, own, split, selection)
    asking = dense or load_dense(config) if asks_turns(own) else None
    return stages.prompts(name, settings=settings, examples=examples, dense=asking)


def render_all(config: RunConfig) -> Prompts:
    """Render the prompts of every benchmark."""
    examples = {benchmark.name: load_examples(benchmark) for benchmark in config.benchmarks}
    train = {name: render(config, name, "train", table) for name, table in examples.items()}
    evaluation = {name: render(config, name, "evaluation", table) for name, table in examples.items()}
    return Prompts(train, evaluation)


def load_dense(config: RunConfig) -> Node:
    """Load the dense model as a safetensors checkpoint."""
    return stages.dense(f"load {config.model.source}", settings=DenseSettings.of(config.model))


def prepare_dense(config: RunConfig, prompts: Prompts) -> Dense:
    """Load the model and score its groups."""
    dense, counts = load_dense(config), None
    if trims_vocabulary(config):
        settings = CountSettings.of(config)
        counts = stages.tokens("count tokens", settings=settings, dense=dense, prompts=prompts.train)
    groups = stages.groups("build graph", dense=dense)
    calibration = draw_calibration(config, dense, prompts) if reads_calibration(config) else None
    importance = stages.importance(
        f"importance {config.pruning.criterion}",
        settings=ImportanceSettings.of(config),
        dense=dense,
        groups=groups,
        calibration=calibration if scores_by_text(config) else None,
    )
    return Dense(dense, groups, calibration, importance, counts)


def checks(config: RunConfig, dense: Dense, prompts: Prompts) -> list[Node]:
    """What is made before any heavy work, so that what cannot go well ends a run at once."""
    first = nodes_in((prompts.train, prompts.evaluation))
    first += [check_ratio(config, dense, ratio) for ratio in config.pruning.ratios]
    first += check_answers(config, prompts, *prompts.train)
    return [*first, *nodes_in(dense.calibration)]


def check_answers(config: RunConfig, prompts: Prompts, *names: str) -> list[Node]:
    """Check that the model's context holds every answer of benchmarks that is tuned on or scored."""
    parts = {"shots": prompts.train, "evaluation": prompts.evaluation}
    asked = [(part, name, of[name]) for part, of in parts.items() for name in names if name in of]
    return [
        stages.answers(
            f"check answers of {name}, {part}",
            settings=data.AnswersSettings(new_tokens(own) if is_written(own := named_benchmark(config, name)) else 0),
            dense=load_dense(config),
            prompts=folder,
        )
        for part, name, folder in asked
        if config.tuning.examples != "none"
    ]


def check_ratio(config: RunConfig, dense: Dense, ratio: float) -> Node:
    """Check that a ratio can be reached."""
    return stages.reach(
        f"check ratio {ratio:g}",
        settings=PruneSettings.of(config, ratio),
        dense=dense.checkpoint,
        groups=dense.groups,
        counts=dense.counts,
    )


def draw_calibration(config: RunConfig, dense: Artifact, prompts: Prompts) -> Node:
    """Draw the sequences of the calibration text, which may be the train prompts."""
    settings = data.CalibrationSettings.of(config)
    read = prompts.train if config.calibration.source == PROMPTS else {}
    name = f"load calibration {config.calibration.source}"
    return stages.calibration(name, settings=settings, dense=dense, prompts=read)


def prune_to(config: RunConfig, dense: Dense, ratio: float, prompts: Prompts) -> Node:
    """Prune to a ratio of the dense model's parameters."""
    scored = {"dense": dense.checkpoint, "groups": dense.groups, "importance": dense.importance}
    split = None
    if dense.counts:
        split = stages.split(
            f"choose split {at(ratio)}",
            settings=SplitSettings.of(config, ratio),
            **scored,
            counts=dense.counts,
            prompts=prompts.train,
        )
    pruned = stages.pruned(
        f"prune {at(ratio)}",
        settings=PruneSettings.of(config, ratio),
        **scored,
        calibration=None if config.reconstruction.method == "none" else dense.calibration,
        split=split,
    )
    return pruned.after(check_ratio(config, dense, ratio))


def tune(config: RunConfig, names: Sequence[str], ratio: float, base: Artifact, prompts: Prompts) -> Node:
    """Tune one adapter for one benchmark or several."""
    label = names[0] if len(names) == 1 else MIXTURE
    shots, settings = {name: prompts.train[name] for name in names}, TuneSettings.of(config, names)
    return stages.adapter(f"tune {label} {at(ratio)}", settings=settings, pruned=base, prompts=shots)


def tune_adapters(config: RunConfig, ratio: float, base: Artifact, prompts: Prompts) -> dict[str, Artifact]:
    """Tune the adapter of every benchmark: its own, the same for all, or (an empty mapping) none."""
    names = list(prompts.train)
    if config.tuning.examples == "none":
        return {}
    if config.tuning.examples == "mixture":
        checked = check_answers(config, prompts, *names)
        return dict.fromkeys(names, tune(config, names, ratio, base, prompts).after(*checked))
    return {
        name: tune(config, [name], ratio, base, prompts).after(*check_answers(config, prompts, name)) for name in names
    }


def tune_dense(config: RunConfig, dense: Artifact, prompts: Prompts) -> TunedDense[Artifact]:
    """Tune the dense model on the same shots as the pruned ones, and score it."""
    adapters = tune_adapters(config, 0.0, dense, prompts)
    return TunedDense(by_training(config, adapters), score_all(config, TUNED_DENSE, dense, prompts, adapters))


def by_training(config: RunConfig, adapters: Artifacts) -> dict[str, Artifact]:
    """The adapters of the benchmarks, by what they were trained on: a mixture has only one."""
    return {MIXTURE: next(iter(adapters.values()))} if config.tuning.examples == "mixture" else dict(adapters)


def score(
    config: RunConfig,
    benchmark: str,
    label: str,
    checkpoint: Artifact,
    prompts: Artifact,
    adapter: Artifact | None = None,
    split: data.PromptSplit = "evaluation",
) -> Node:
    """Score a checkpoint, with or without an adapter; a search for transformers or vLLM proves labels as written."""
    goal = config.goal if isinstance(config, SmallestConfig) and split == "evaluation" else None
    writes = goal is not None and goal.runtime != "llama.cpp"
    settings = ScoreSettings.of(named_benchmark(config, benchmark), split, writes)
    name = f"score {benchmark} {label}"
    return stages.scores(name, settings=settings, checkpoint=checkpoint, adapter=adapter, prompts=prompts)


def score_all(
    config: RunConfig, label: str, checkpoint: Artifact, prompts: Prompts, adapters: Artifacts
) -> dict[str, Artifact]:
    """Score a checkpoint, with the adapter of each benchmark that has one, on all benchmarks that have prompts."""
    return {
        name: score(config, name, label, checkpoint, asked, adapters.get(name))
        for name, asked in prompts.evaluation.items()
    }


def measure_perplexity(config: RunConfig, label: str, checkpoint: Artifact, dense: Artifact | None = None) -> Node:
    """Measure a checkpoint's perplexity; for a pruned one, the tokens of `dense` say where the text ends."""
    cut_by, settings = dense if trims_vocabulary(config) else None, PerplexitySettings.of(config.perplexity)
    return stages.perplexity(f"perplexity {label}", settings=settings, checkpoint=checkpoint, text_of=cut_by)


def measure(
    config: RunConfig, label: str, checkpoint: Artifact, prompts: Prompts, dense: Artifact | None = None
) -> MeasuredModel[Artifact]:
    """Measure a model without an adapter: its perplexity, and its scores on all benchmarks that have prompts."""
    perplexity = measure_perplexity(config, label, checkpoint, dense)
    return MeasuredModel(checkpoint, perplexity, score_all(config, label, checkpoint, prompts, {}))
