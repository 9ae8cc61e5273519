"""The result of a search for the smallest model: candidates, the sequence of tests, and the answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from tailored_llama.config import GgufType, GoalConfig
from tailored_llama.errors import InputError
from tailored_llama.evaluation.proof import LossTest

FileType = GgufType | Literal["source"] | None  # "source": the GGUF file of the base model, as it is; None: 16 bits


@dataclass(frozen=True)
class RowSet:
    """Rows of a benchmark that serve one purpose: how many, and the SHA-256 of their texts and right answers."""

    rows: int
    digest: str


@dataclass(frozen=True)
class CandidateFigures:
    """A model that was measured; losses by benchmark are shares, on the choosing rows, against the reference."""

    base: str
    ratio: float  # what was removed of its parameters; 0 is the dense model
    type: FileType
    trimmed: bool  # only tokens were removed, all that further texts hardly need
    tuned: bool  # it has an adapter, merged in
    parameters: int
    bytes: int
    cost: float  # what is to be small, in bytes or seconds
    losses: Mapping[str, float]
    smoothed: float  # the loss on the worst benchmark, smoothed along the ratios and from more bits to fewer

    @property
    def loss(self) -> float:
        """The loss on the worst benchmark."""
        return max(self.losses.values())

    @property
    def label(self) -> str:
        """Such as `smollm2-135m-instruct, 50 % removed, tuned, q8_0`."""
        if self.type == "source":
            return f"{self.base}, the file as it is"
        how = "dense" if not self.ratio else "vocabulary trimmed" if self.trimmed else f"{self.ratio:.0%} removed"
        parts = [self.base, how.replace("%", " %"), "tuned" if self.tuned else "not tuned", self.type or "16 bits"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Answer:
    """The result of a search."""

    goal: GoalConfig
    reference: str  # the dense model that candidates are compared with, in words
    candidates: Sequence[CandidateFigures]  # all that were measured, by cost, the largest first
    order: Sequence[int]  # of candidates to test, by position, the safest first; empty if none passed on choosing rows
    tests: Sequence[Mapping[str, LossTest]]  # in that order, by benchmark; the first that fails ends the sequence
    opening: int | None  # how often the proving rows have been opened for this goal, from 1; None: they were not
    sets: Mapping[str, Mapping[str, RowSet]]  # of each benchmark, by purpose: tuning, choosing, proving
    nearest: int  # the position of the candidate that lost least on the choosing rows
    record: str = "the store"  # where the opening is recorded
    failed: Mapping[str, str] = field(default_factory=dict)  # by label: why it could not be made or reached
    # Of rows that had none, by benchmark and example; a benchmark is missing if all its rows had theirs.
    labels: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    doubt: str = ""  # a sentence, if the reference is hardly better than without skill

    @property
    def tested(self) -> dict[int, Mapping[str, LossTest]]:
        """The tests by the position of their candidate, in their order."""
        return dict(zip(self.order, self.tests, strict=False))

    @property
    def proven(self) -> int | None:
        """The position of the smallest candidate that is proven, which is the answer; None: no candidate is."""
        passed = [place for place, tests in self.tested.items() if is_proven(tests)]
        return passed[-1] if passed else None


def is_proven(tests: Mapping[str, LossTest]) -> bool:
    """Return whether a candidate is proven on every benchmark: no loss is averaged away."""
    return all(test.proven for test in tests.values())


def write_answer(answer: Answer, folder: Path) -> None:
    """Write `answer.json`, all of an answer."""
    (folder / "answer.json").write_bytes(TypeAdapter(Answer).dump_json(answer, indent=2))


def read_answer(folder: Path) -> Answer:
    """The answer that `write_answer` wrote; InputError if the file is missing, or not an answer."""
    try:
        return TypeAdapter(Answer).validate_json((folder / "answer.json").read_bytes())
    except (OSError, ValueError):
        raise InputError(f"{folder / 'answer.json'}: missing or not the answer of a search") from None
