"""The steps from a configuration to its models, as plain calls of stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tailored_llama import data
from tailored_llama.config import (
    GENERIC,
    PROMPTS,
    TUNED_DENSE,
    BenchmarkConfig,
    RunConfig,
    asks_turns,
    healing_text,
    is_written,
    named_benchmark,
    reads_calibration,
    reads_train,
    scores_by_text,
    trims_vocabulary,
    with_template,
)
from tailored_llama.evaluation import MeasuredModel, PerplexitySettings, ScoreSettings, TunedDense
from tailored_llama.models import DenseSettings
from tailored_llama.pipeline import stages
from tailored_llama.pipeline.futures import Artifact
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pruning import CountSettings, ImportanceSettings, PruneSettings, SplitSettings
from tailored_llama.training import HealSettings, TeachSettings, TuneSettings

MIXTURE = "mixture"  # names the adapter that is tuned on all benchmarks at once


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts by benchmark.

    `train` are the run's own train prompts, which may serve as calibration text. `shots` are the prompts to tune on,
    worded differently if one adapter is tuned on all benchmarks.
    """

    train: Mapping[str, Artifact] = field(default_factory=dict)
    shots: Mapping[str, Artifact] = field(default_factory=dict)
    evaluation: Mapping[str, Artifact] = field(default_factory=dict)

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


def load_examples(run: Runner, benchmark: BenchmarkConfig) -> Artifact:
    """Load all examples of a benchmark."""
    return run(stages.EXAMPLES, data.BenchmarkSource(benchmark), f"load {benchmark.name}")


def render(
    run: Runner, config: RunConfig, benchmark: str, split: data.RenderedSplit, examples: Artifact, selection: int = 0
) -> Artifact:
    """Render one split of a benchmark; `selection` is the number of train examples in the split of that name."""
    own, name = named_benchmark(config, benchmark), f"render {benchmark} {split} {config.prompts.template}"
    settings = data.PromptSettings.of(config, own, split, selection)
    dense = load_dense(run, config) if asks_turns(own) else None  # whose chat template may ask
    return run(stages.PROMPTS, settings, name, examples=examples, dense=dense)


def render_train(run: Runner, config: RunConfig) -> Prompts:
    """Render the train prompts of every benchmark, and nothing else."""
    train = {
        benchmark.name: render(run, config, benchmark.name, "train", load_examples(run, benchmark))
        for benchmark in config.benchmarks
    }
    return Prompts(train, train)


def render_all(run: Runner, config: RunConfig) -> Prompts:
    """Render the prompts of every benchmark; the shots of a mixture use the generic template."""
    examples = {benchmark.name: load_examples(run, benchmark) for benchmark in config.benchmarks}
    read = {name: table for name, table in examples.items() if reads_train(config, name)}
    train = {name: render(run, config, name, "train", table) for name, table in read.items()}
    shots = train
    if config.tuning.examples == "mixture":
        worded = with_template(config, GENERIC)
        shots = {name: render(run, worded, name, "train", table) for name, table in examples.items()}
    evaluation = {name: render(run, config, name, "evaluation", table) for name, table in examples.items()}
    return Prompts(train, shots, evaluation)


def load_dense(run: Runner, config: RunConfig) -> Artifact:
    """Load the dense model as a safetensors checkpoint."""
    return run(stages.DENSE, DenseSettings.of(config.model), f"load {config.model.source}")


def prepare_dense(run: Runner, config: RunConfig, prompts: Prompts) -> Dense:
    """Load the model and score its groups; cheap stages and checks come first."""
    dense, counts = load_dense(run, config), None
    if trims_vocabulary(config):  # a mixture counts in both wordings
        mixed = {f"{name}, shots": ref for name, ref in prompts.shots.items() if ref is not prompts.train.get(name)}
        asked = {**prompts.train, **mixed}
        counts = run(stages.TOKENS, CountSettings.of(config), "count tokens", dense=dense, prompts=asked)
    groups = run(stages.GROUPS, None, "build graph", dense=dense)
    for ratio in config.pruning.ratios:  # one that cannot be reached ends the run here
        run.open(check_ratio(run, config, ratio, dense, groups, counts))
    check_answers(run, config, dense, prompts)
    calibration = draw_calibration(run, config, dense, prompts) if reads_calibration(config) else None
    if config.healing.tokens and config.healing.source:
        draw_calibration(run, healing_text(config), dense, prompts)  # a text that cannot be read ends the run here
    text = calibration if scores_by_text(config) else None
    settings, name = ImportanceSettings.of(config), f"importance {config.pruning.criterion}"
    importance = run(stages.IMPORTANCE, settings, name, dense=dense, groups=groups, calibration=text)
    return Dense(dense, groups, calibration, importance, counts)


def check_answers(run: Runner, config: RunConfig, dense: Artifact, prompts: Prompts) -> None:
    """Check that the model's context holds every answer, before any heavy work; InputError: one is too long."""
    for name, shots in prompts.shots.items() if config.tuning.examples != "none" else ():
        for asked in filter(None, (shots, prompts.evaluation.get(name))):
            try:
                folder = run.open(asked)
            except Exception:  # it stops only what reads it
                continue
            data.check_answers(run.open(dense), folder, is_written(named_benchmark(config, name)))


def check_ratio(
    run: Runner, config: RunConfig, ratio: float, dense: Artifact, groups: Artifact, counts: Artifact | None
) -> Artifact:
    """Check that a ratio can be reached."""
    settings = PruneSettings.of(config, ratio)
    return run(stages.REACH, settings, f"check ratio {ratio:g}", dense=dense, groups=groups, counts=counts)


def draw_calibration(run: Runner, config: RunConfig, dense: Artifact, prompts: Prompts) -> Artifact:
    """Draw the sequences of the calibration text, which may be the train prompts."""
    settings = data.CalibrationSettings.of(config)
    read = prompts.train if config.calibration.reads(PROMPTS) else {}
    return run(stages.CALIBRATION, settings, f"load calibration {config.calibration.named}", dense=dense, prompts=read)


def prune_to(run: Runner, config: RunConfig, dense: Dense, ratio: float, prompts: Prompts) -> Artifact:
    """Prune to a ratio of the dense model's parameters."""
    scored, split = {"dense": dense.checkpoint, "groups": dense.groups, "importance": dense.importance}, None
    text = None if config.reconstruction.method == "none" else dense.calibration
    if dense.counts:
        read = {"counts": dense.counts, "prompts": prompts.train}
        split = run(stages.SPLIT, SplitSettings.of(config, ratio), f"choose split @ {ratio:.2f}", **scored, **read)
    settings, name = PruneSettings.of(config, ratio), f"prune @ {ratio:.2f}"
    return run(stages.PRUNED, settings, name, **scored, calibration=text, split=split)


def heal_if_asked(
    run: Runner, config: RunConfig, dense: Artifact, ratio: float, pruned: Artifact, prompts: Prompts
) -> Artifact:
    """The pruned model, healed on a text with the dense model's outputs; as it is if healing is not configured."""
    if not config.healing.tokens:
        return pruned
    text = draw_calibration(run, healing_text(config), dense, prompts)
    teacher = run(stages.TEACHER, TeachSettings.of(config), "teach text for healing", dense=dense, text=text)
    return run(stages.HEALED, HealSettings.of(config), f"heal @ {ratio:.2f}", pruned=pruned, teacher=teacher)


def tune(
    run: Runner, config: RunConfig, names: Sequence[str], ratio: float, base: Artifact, prompts: Prompts
) -> Artifact:
    """Tune one adapter for one benchmark or several."""
    label = names[0] if len(names) == 1 else MIXTURE
    shots, settings = {name: prompts.shots[name] for name in names}, TuneSettings.of(config, names)
    return run(stages.ADAPTER, settings, f"tune {label} @ {ratio:.2f}", pruned=base, prompts=shots)


def tune_adapters(
    run: Runner, config: RunConfig, ratio: float, base: Artifact, prompts: Prompts
) -> dict[str, Artifact]:
    """Tune the adapter of every benchmark: its own, the same for all, or (an empty mapping) none."""
    names = list(prompts.train)
    if config.tuning.examples == "none":
        return {}
    if config.tuning.examples == "mixture":
        return dict.fromkeys(names, tune(run, config, names, ratio, base, prompts))
    return {name: tune(run, config, [name], ratio, base, prompts) for name in names}


def tune_dense(run: Runner, config: RunConfig, dense: Artifact, prompts: Prompts) -> TunedDense[Artifact]:
    """Tune the dense model on the same shots as the pruned ones, and score it; it is not healed, as it is whole."""
    adapters = tune_adapters(run, config, 0.0, dense, prompts)
    return TunedDense(by_training(config, adapters), score_all(run, config, TUNED_DENSE, dense, prompts, adapters))


def by_training(config: RunConfig, adapters: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """The adapters of the benchmarks, by what they were trained on: a mixture has only one."""
    return {MIXTURE: next(iter(adapters.values()))} if config.tuning.examples == "mixture" else dict(adapters)


def score(
    run: Runner,
    config: RunConfig,
    benchmark: str,
    label: str,
    checkpoint: Artifact,
    prompts: Artifact,
    adapter: Artifact | None = None,
    split: data.PromptSplit = "evaluation",
) -> Artifact:
    """Score a checkpoint, with or without an adapter, on a benchmark's prompts."""
    settings = ScoreSettings.of(named_benchmark(config, benchmark), split)
    name = f"score {benchmark} {label}"
    return run(stages.SCORES, settings, name, checkpoint=checkpoint, adapter=adapter, prompts=prompts)


def score_all(
    run: Runner, config: RunConfig, label: str, checkpoint: Artifact, prompts: Prompts, adapters: Mapping[str, Artifact]
) -> dict[str, Artifact]:
    """Score a checkpoint, with the adapter of each benchmark that has one, on all benchmarks that have prompts."""
    return {
        name: score(run, config, name, label, checkpoint, asked, adapters.get(name))
        for name, asked in prompts.evaluation.items()
    }


def measure_perplexity(
    run: Runner, config: RunConfig, label: str, checkpoint: Artifact, dense: Artifact | None = None
) -> Artifact:
    """Measure a checkpoint's perplexity; for a pruned one, the tokens of `dense` say where the text ends."""
    cut_by, settings = dense if trims_vocabulary(config) else None, PerplexitySettings.of(config.perplexity)
    return run(stages.PERPLEXITY, settings, f"perplexity {label}", checkpoint=checkpoint, text_of=cut_by)


def measure(
    run: Runner, config: RunConfig, label: str, checkpoint: Artifact, prompts: Prompts, dense: Artifact | None = None
) -> MeasuredModel[Artifact]:
    """Measure a model without an adapter: its perplexity, and its scores on all benchmarks that have prompts."""
    perplexity = measure_perplexity(run, config, label, checkpoint, dense)
    return MeasuredModel(checkpoint, perplexity, score_all(run, config, label, checkpoint, prompts, {}))
