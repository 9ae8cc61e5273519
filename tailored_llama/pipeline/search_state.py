"""What a search knows: the base models, where a candidate stands on their ladders, and what was measured so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tailored_llama import reports
from tailored_llama.config import SmallestConfig
from tailored_llama.evaluation import Answers, Candidate, CandidateParts, FileType, Rung
from tailored_llama.pipeline.futures import Artifact
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pipeline.steps import Dense, Prompts

ScoredSplit = Literal["selection", "evaluation"]  # the rows to choose with, and those to prove on
OfBenchmarks = Mapping[str, Artifact]  # by benchmark


@dataclass(frozen=True)
class Step:
    """A place on the ladders of a base model: what is removed; `tokens` that stay, if only tokens leave."""

    ratio: float
    tokens: int | None = None

    @property
    def label(self) -> str:
        return "trimmed" if self.tokens else f"@ {self.ratio:.2f}" if self.ratio else "dense"


ModelKey = tuple[str, Step, bool]  # the base model, what is removed, and whether it is the user's file as it is


@dataclass(frozen=True)
class Base:
    """A base model, ready to be pruned: its run, and its prompts, also those of each set of rows."""

    config: SmallestConfig
    prompts: Prompts
    rows: Mapping[ScoredSplit, OfBenchmarks]
    dense: Dense
    steps: tuple[Step, ...]  # by size
    unreachable: Mapping[str, str]  # why further ratios are not among them

    @property
    def name(self) -> str:
        """The name for people, without folders: cards leave this machine."""
        return str(reports.without_folders(self.config.model.source))


@dataclass(frozen=True)
class Model:
    """A checkpoint, and the adapter to merge into it, if that is better than none; `label` is for people."""

    label: str
    checkpoint: Artifact
    adapter: Artifact | None


@dataclass
class SearchState:
    """What is known so far of the candidates of a search, and of the dense model that they are compared with."""

    run: Runner
    config: SmallestConfig
    bases: Sequence[Base]
    ladders: Sequence[tuple[Base, FileType]]  # a file as it is has one rung
    reference: Model
    answers: Mapping[str, Answers]  # of the reference on the choosing rows, by benchmark
    models: dict[ModelKey, Model]
    doubt: str  # as in `Answer`
    parts: dict[Rung, CandidateParts[Artifact]] = field(default_factory=dict)
    candidates: dict[Rung, Candidate] = field(default_factory=dict)  # before smoothing
    failed: dict[str, Exception] = field(default_factory=dict)

    def locate(self, rung: Rung) -> tuple[Base, FileType, Step]:
        """The base model, the type of file and the step of a rung."""
        base, kind = self.ladders[rung.ladder]
        return base, kind, base.steps[rung.position]

    def model_key(self, rung: Rung) -> ModelKey:
        """What rungs have in common that are one model in several types of file."""
        base, kind, step = self.locate(rung)
        return base.config.model.source, step, kind == "source"

    def label(self, rung: Rung) -> str:
        base, kind, step = self.locate(rung)
        if kind == "source":
            return f"{base.config.model.short_name}, the file as it is"
        return f"{base.config.model.short_name} {step.label}, {kind or '16 bits'}"
