"""What flows and tasks exchange: named references to artifacts, never a model, a tensor or a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tailored_llama.store import ArtifactRef


@dataclass(frozen=True)
class MeasuredModel:
    """A checkpoint and its measurements; `scores` are by benchmark. In an incomplete run some may be missing."""

    checkpoint: ArtifactRef
    perplexity: ArtifactRef | None
    scores: Mapping[str, ArtifactRef] = field(default_factory=dict)


@dataclass(frozen=True)
class TailoredRun:
    """A pruned model and what was made from it.

    `adapters` are by what they were trained on: a benchmark, or `mixture`. `tailored` are the scores with the adapters,
    by benchmark. `profile` is None if nothing was timed, `pieces` if the vocabulary was not trimmed.
    """

    ratio: float
    pruned: MeasuredModel
    healed: MeasuredModel | None
    adapters: Mapping[str, ArtifactRef]
    tailored: Mapping[str, ArtifactRef]
    profile: ArtifactRef | None = None
    pieces: ArtifactRef | None = None

    @property
    def base(self) -> ArtifactRef:
        """What the adapters were trained on."""
        return (self.healed or self.pruned).checkpoint

    def adapter(self, benchmark: str) -> ArtifactRef:
        """The adapter for a benchmark."""
        return self.adapters.get(benchmark) or self.adapters["mixture"]


@dataclass(frozen=True)
class TunedDense:
    """The dense model tuned on the same shots: its adapters, by what they were trained on, and scores, by benchmark."""

    adapters: Mapping[str, ArtifactRef] = field(default_factory=dict)
    scores: Mapping[str, ArtifactRef] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantisedScore:
    """A model with the weights of a GGUF type on a benchmark; `ratio` is None for the dense model."""

    ratio: float | None
    type: str
    benchmark: str
    scores: ArtifactRef


@dataclass(frozen=True)
class SweptCell:
    """A dense model (ratio 0) or a cell of a sweep: its measurements, or the error that left none.

    `dense` is the cell's dense model, scored on the cell's prompts. `templates` are the template sets that a search
    chose, by benchmark.
    """

    label: str
    ratio: float
    seed: int
    curve: str | None = None
    place: float | None = None
    model: MeasuredModel | None = None
    dense: MeasuredModel | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class TransferScore:
    """A model of a transfer on one benchmark: its scores, or the error that left none."""

    model: str
    benchmark: str
    scores: ArtifactRef | None = None
    error: str | None = None


@dataclass(frozen=True)
class StudiedBenchmark:
    """A benchmark of a prompt study: the chosen template set, and the scores and prompts by template set."""

    chosen: str
    selection: Mapping[str, ArtifactRef]
    evaluation: Mapping[str, ArtifactRef]
    prompts: Mapping[str, ArtifactRef]
