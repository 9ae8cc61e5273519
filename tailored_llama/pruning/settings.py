"""What token counts, importance and a pruned checkpoint depend on, beside the artifacts that they are made from."""

from __future__ import annotations

from dataclasses import dataclass

from tailored_llama.config import (
    PROMPTS,
    QUESTIONS,
    BenchmarkConfig,
    Criterion,
    PlanConfig,
    ReconstructionConfig,
    RunConfig,
    TextConfig,
    drops_layers,
    narrow,
    trims_vocabulary,
    with_defaults,
)
from tailored_llama.data import BUILTIN, TextSource, calibration_parts, find_text, text_of


@dataclass(frozen=True)
class CountedText:
    """A text whose tokens are counted, and its weight among several."""

    source: TextSource
    weight: float


@dataclass(frozen=True)
class CountSettings:
    """The texts whose tokens are counted beside the prompts, and how many characters of each at most.

    Of a longer text, evenly spaced documents are counted.
    """

    texts: tuple[CountedText, ...]
    characters: int = 20_000_000

    @classmethod
    def of(cls, config: RunConfig) -> CountSettings:
        """All texts of the calibration but the prompts, which have counts of their own."""
        parts = [part for part in calibration_parts(config) if part.text.source != PROMPTS]
        return cls(tuple(CountedText(text_of(part), 1.0 if len(parts) == 1 else part.weight) for part in parts))

    @classmethod
    def general(cls) -> CountSettings:
        """What stands for text in general: the train splits of the embedded benchmarks, alike."""
        text = TextConfig(source=QUESTIONS)
        sources = (find_text(text, asked=BenchmarkConfig(name=name)) for name in BUILTIN)
        return cls(tuple(CountedText(source, 1.0) for source in sources), characters=2_000_000)


@dataclass(frozen=True)
class ImportanceSettings:
    """The criterion of importance, the seed of one that draws, and whether the influence of layers is measured."""

    criterion: Criterion
    seed: int | None = None
    influence: bool = False

    @classmethod
    def of(cls, config: RunConfig) -> ImportanceSettings:
        criterion = config.pruning.criterion
        seed = config.seed if criterion in ("random", "taylor_gate") else None
        return cls(criterion, seed, drops_layers(config))


@dataclass(frozen=True)
class SplitSettings:
    """The fraction of the original parameters that is to leave, and which groups may."""

    ratio: float
    plan: PlanConfig

    @classmethod
    def of(cls, config: RunConfig, ratio: float) -> SplitSettings:
        return cls(ratio, narrow(config.pruning, PlanConfig))


@dataclass(frozen=True)
class PruneSettings:
    """The fraction of the original parameters that is gone, which groups leave, and how the rest is fitted."""

    ratio: float
    plan: PlanConfig
    reconstruction: ReconstructionConfig

    @classmethod
    def of(cls, config: RunConfig, ratio: float) -> PruneSettings:
        plan, reconstruction = narrow(config.pruning, PlanConfig), config.reconstruction
        if not trims_vocabulary(config):
            plan = with_defaults(plan, "vocabulary")
        if reconstruction.method == "none":
            reconstruction = with_defaults(reconstruction, "ridge")
        return cls(ratio, plan, reconstruction)
