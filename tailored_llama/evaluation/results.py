"""The parts of runs, sweeps and searches: named artifacts, as nodes in a composition and as folders in a stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

A = TypeVar("A")  # an artifact: a future of it, its reference, or its folder
ByType = Mapping[str, Mapping[str, A]]  # of a GGUF file → benchmark → scores of its weights


@dataclass(frozen=True)
class MeasuredModel(Generic[A]):
    """A checkpoint and its measurements, by benchmark. In an incomplete run some may be missing."""

    checkpoint: A
    perplexity: A | None
    scores: Mapping[str, A] = field(default_factory=dict)
    quantised: ByType[A] = field(default_factory=dict)  # scores in fewer bits


@dataclass(frozen=True)
class TailoredRun(Generic[A]):
    """A pruned model and what was made from it."""

    ratio: float
    pruned: MeasuredModel[A]
    adapters: Mapping[str, A]  # by what they were trained on: a benchmark, or `mixture`
    tailored: Mapping[str, A]  # scores with the adapters, by benchmark
    quantised: ByType[A] = field(default_factory=dict)  # scores with the adapters in fewer bits

    @property
    def label(self) -> str:
        return f"pruned {self.ratio}"

    def adapter(self, benchmark: str) -> A:
        return self.adapters.get(benchmark) or self.adapters["mixture"]


@dataclass(frozen=True)
class TunedDense(Generic[A]):
    """The dense model tuned on the same shots: its adapters, by what they were trained on, and scores, by benchmark."""

    adapters: Mapping[str, A] = field(default_factory=dict)
    scores: Mapping[str, A] = field(default_factory=dict)


@dataclass(frozen=True)
class SweptCell(Generic[A]):
    """A dense model (ratio 0) or a cell of a sweep: its measurements, or the error that left none."""

    name: str
    ratio: float
    seed: int
    model: MeasuredModel[A] | None = None
    dense: MeasuredModel[A] | None = None  # the cell's dense model, scored on the cell's prompts
    error: str | None = None


@dataclass(frozen=True)
class Proof(Generic[A]):
    """The artifacts that prove a model: the proving rows, and the scores of both models on them, by benchmark."""

    prompts: Mapping[str, A]
    dense: Mapping[str, A]
    small: Mapping[str, A]
