"""The settings of token counts, importance and pruned checkpoints, beside the artifacts that they are made from."""

from dataclasses import dataclass
from typing import Self

from tailored_llama.config import (
    Criterion,
    PlanConfig,
    ReconstructionConfig,
    RunConfig,
    narrow,
    trims_vocabulary,
    with_defaults,
)
from tailored_llama.data import TextSource, calibration_texts


@dataclass(frozen=True)
class CountSettings:
    """The texts whose tokens are counted beside the prompts."""

    texts: tuple[TextSource, ...]

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """All texts of the calibration but the prompts, which have counts of their own."""
        sources = (drawn.source for drawn in calibration_texts(config))
        return cls(tuple(source for source in sources if source.kind != "prompts"))


@dataclass(frozen=True)
class ImportanceSettings:
    """The criterion of importance, and the seed of one that draws."""

    criterion: Criterion
    seed: int | None = None

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        criterion = config.pruning.criterion
        return cls(criterion, config.seed if criterion in ("random", "taylor_gate") else None)


@dataclass(frozen=True)
class SplitSettings:
    """The fraction of all parameters that is to leave, and which groups may."""

    ratio: float
    plan: PlanConfig

    @classmethod
    def of(cls, config: RunConfig, ratio: float) -> Self:
        return cls(ratio, narrow(config.pruning, PlanConfig))


@dataclass(frozen=True)
class PruneSettings:
    """The fraction of all parameters that is to leave, which groups leave, and how the rest is fitted."""

    ratio: float
    plan: PlanConfig
    reconstruction: ReconstructionConfig

    @classmethod
    def of(cls, config: RunConfig, ratio: float) -> Self:
        plan, reconstruction = narrow(config.pruning, PlanConfig), config.reconstruction
        if not trims_vocabulary(config):
            plan = with_defaults(plan, "vocabulary")
        if reconstruction.method == "none":
            reconstruction = with_defaults(reconstruction, "ridge")
        return cls(ratio, plan, reconstruction)
