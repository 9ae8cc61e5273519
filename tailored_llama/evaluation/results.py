"""What runs and studies are made of: named artifacts. They are futures in a composition, and folders in a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

A = TypeVar("A")  # an artifact: a future of it, its reference, or its folder
ByType = Mapping[str, Mapping[str, A]]  # of a GGUF file → benchmark → scores of its weights


@dataclass(frozen=True)
class MeasuredModel(Generic[A]):
    """A checkpoint and its measurements; `scores` are by benchmark. In an incomplete run some may be missing.

    `templates` are the template sets that a search chose, by benchmark. `quantised` are the scores in fewer bits.
    """

    checkpoint: A
    perplexity: A | None
    scores: Mapping[str, A] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    quantised: ByType[A] = field(default_factory=dict)


@dataclass(frozen=True)
class TailoredRun(Generic[A]):
    """A pruned model and what was made from it.

    `adapters` are by what they were trained on: a benchmark, or `mixture`. `tailored` are the scores with the adapters,
    by benchmark, `quantised` those in fewer bits. `profile` is None if nothing was timed.
    """

    ratio: float
    pruned: MeasuredModel[A]
    healed: MeasuredModel[A] | None
    adapters: Mapping[str, A]
    tailored: Mapping[str, A]
    profile: A | None = None
    quantised: ByType[A] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"pruned {self.ratio}"

    @property
    def base(self) -> A:
        """What the adapters were trained on."""
        return (self.healed or self.pruned).checkpoint

    def adapter(self, benchmark: str) -> A:
        """The adapter for a benchmark."""
        return self.adapters.get(benchmark) or self.adapters["mixture"]


@dataclass(frozen=True)
class TunedDense(Generic[A]):
    """The dense model tuned on the same shots: its adapters, by what they were trained on, and scores, by benchmark."""

    adapters: Mapping[str, A] = field(default_factory=dict)
    scores: Mapping[str, A] = field(default_factory=dict)


@dataclass(frozen=True)
class SweptCell(Generic[A]):
    """A dense model (ratio 0) or a cell of a sweep: its measurements, or the error that left none.

    `dense` is the cell's dense model, scored on the cell's prompts.
    """

    name: str
    ratio: float
    seed: int
    curve: str | None = None
    place: float | None = None
    model: MeasuredModel[A] | None = None
    dense: MeasuredModel[A] | None = None
    error: str | None = None


@dataclass(frozen=True)
class TransferScore(Generic[A]):
    """A model of a transfer on one benchmark: its scores, or the error that left none.

    `model` is the benchmark that the adapter was tuned on, or the name of another model.
    """

    model: str
    benchmark: str
    scores: A | None = None
    error: str | None = None

    @property
    def label(self) -> str:
        return f"{self.model} on {self.benchmark}"


@dataclass(frozen=True)
class StudiedBenchmark(Generic[A]):
    """A benchmark of a prompt study: the chosen template set, and what was scored, by template set.

    `selection` are the scores on the slice, `evaluation` those on the evaluation split, whose prompts are `prompts`.
    """

    benchmark: str
    chosen: str
    selection: Mapping[str, A]
    evaluation: Mapping[str, A]
    prompts: Mapping[str, A] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.benchmark
