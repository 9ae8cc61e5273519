"""The certificate of a proven model, as it is read: what it may say, and whether it agrees with itself.

Whoever publishes a model writes its certificate, so nothing in it is trusted. It names rows, prompts and figures.
Nothing that it names is run, and no file is opened that is not beside it.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field

from tailored_llama import evaluation
from tailored_llama.config import Metric, Section, validate_as
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Array, FileType
from tailored_llama.store import is_safe_relative

LARGEST = 4_000_000  # bytes
CLOSE = 1e-6  # other versions of SciPy differ by less


def _in_folder(name: str) -> str:
    if not is_safe_relative(name):
        raise ValueError("allowed: a file in the folder")
    return name


Share = Annotated[float, Field(ge=0, le=1)]
Loss = Annotated[float, Field(ge=-1, le=1)]
Level = Annotated[float, Field(gt=0, le=0.5)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Rows = Annotated[int, Field(ge=0, le=1_000_000)]
Text = Annotated[str, Field(max_length=2000, pattern=r"^\P{Cc}*$")]  # one line, and nothing that moves a cursor
Name = Annotated[str, Field(pattern=r"^(lm_eval:)?[A-Za-z0-9][A-Za-z0-9_.-]{0,95}$")]  # of a benchmark
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(_in_folder)]
Unread = dict[str, Any]  # settings of how the model was made, for people


class Stated(Section):
    """Base of all parts: values have their types already, and figures are numbers."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class StatedCounts(Stated):
    """`evaluation.Counts`."""

    both: Rows
    only_dense: Rows
    only_small: Rows
    neither: Rows


class StatedTest(Stated):
    """`evaluation.LossTest`, with what follows from it."""

    rows: Rows = Field(ge=2)
    margin: Share = Field(gt=0, lt=1)
    level: Level
    nominal: Level | None = None
    dense: Share
    small: Share
    loss: Loss
    bound: Loss
    p: Share
    bootstrap: Share
    counts: StatedCounts | None
    proven: bool


class StatedStep(Stated):
    """A candidate that was tested."""

    candidate: Text
    proven: bool
    benchmarks: dict[Name, StatedTest]


class StatedRows(Stated):
    """`evaluation.RowSet`."""

    rows: Rows
    sha256: Sha256


class StatedScoring(Stated):
    """How the rows were asked."""

    metrics: dict[Name, Metric]
    template: Text
    num_fewshot: Rows


class StatedCandidate(Stated):
    """`evaluation.Candidate`."""

    base: Text
    ratio: Share
    type: FileType
    trimmed: bool
    tuned: bool
    parameters: Count
    bytes: Count
    cost: float = Field(ge=0)
    losses: dict[Name, Loss]
    smoothed: Loss


class StatedModel(Stated):
    """The model and the files that it consists of."""

    candidate: StatedCandidate
    name: Text
    bytes: Count
    sha256: dict[FileName, Sha256] = Field(min_length=1)


class StatedRun(Stated):
    """The settings of the search. `read_certificate` reads those that ask the rows; nothing reads the others."""

    benchmarks: list[dict[str, Any]] = Field(min_length=1)
    seed: Count
    prompts: dict[str, Any]
    scoring: dict[str, Any]
    model: dict[str, Any]
    goal: dict[str, Any]
    calibration: Unread
    pruning: Unread
    reconstruction: Unread
    healing: Unread
    tuning: Unread
    perplexity: Unread
    profile: Unread


class CertificateFile(Stated):
    """`certificate.json`. Format 1 has no hashes of files other than weights, no nominal levels and no `record`."""

    format: Literal[1, 2]
    claim: Text
    margin_points: float = Field(gt=0, lt=100)
    measure: Literal["accuracy", "probability"]
    confidence: float = Field(ge=0.5, lt=1)
    level: Level
    opening: int = Field(ge=1, le=100)
    record: Text = "the store"
    reference: Text
    benchmarks: dict[Name, StatedTest] = Field(min_length=1)
    sequence: list[StatedStep] = Field(min_length=1)
    sets: dict[Name, dict[Literal["tuning", "choosing", "proving"], StatedRows]]
    scoring: StatedScoring
    model: StatedModel
    libraries: dict[str, Text]
    run: StatedRun

    def contradictions(self) -> Iterator[str]:
        names, steps = sorted(self.benchmarks), {f"sequence.{i}": step for i, step in enumerate(self.sequence)}
        named = {f"{where}.benchmarks": sorted(step.benchmarks) for where, step in steps.items()}
        named |= {"sets": sorted(self.sets), "run.benchmarks": sorted(str(b.get("name")) for b in self.run.benchmarks)}
        for where, got in named.items():
            if got != names:
                yield f"{where}: got {got}; allowed: {names}, as in benchmarks"
        if not _is_close(self.level, level := evaluation.level_of(self.opening, self.confidence)):
            yield f"level: got {self.level:g}; allowed: {level:g}, at opening {self.opening} and this confidence"
        for where, step in steps.items():
            for name, test in step.benchmarks.items():
                yield from self._faults(f"{where}.benchmarks.{name}", name, test)
            if step.proven != (proven := all(test.proven for test in step.benchmarks.values())):
                yield f"{where}.proven: got {step.proven}; allowed: {proven}, by its tests"
            if not proven and step is not self.sequence[-1]:
                yield f"{where}.proven: got False; allowed: at the end alone, as the first failure ends the sequence"
        answer = next((step for step in reversed(self.sequence) if step.proven), None)
        if answer is None or answer.benchmarks != self.benchmarks:
            yield "benchmarks: got figures of no proven model; allowed: those of the last proven one of sequence"

    def _faults(self, where: str, name: str, test: StatedTest) -> Iterator[str]:
        """What is wrong with a test, by its rows and counts."""
        proving, counts = self.sets[name].get("proving"), test.counts
        totals = [proving.rows if proving else 0, *([sum(counts.model_dump().values())] if counts else [])]
        for total in totals:
            if test.rows != total:
                yield f"{where}.rows: got {test.rows}; allowed: {total}, by the sets and counts"
        for field, value in (("margin", self.margin_points / 100), ("level", self.level)):
            if not _is_close(got := getattr(test, field), value):
                yield f"{where}.{field}: got {got:g}; allowed: {value:g}, as for the whole"
        if counts and self.format > 1:
            size = evaluation.exact_size(test.rows, test.margin, test.nominal) if test.nominal else 1
            if size > test.level * (1 + CLOSE):
                yield f"{where}.nominal: got {test.nominal}; allowed: at most what keeps the level {test.level:g}"
        elif test.nominal:
            yield f"{where}.nominal: got {test.nominal}; allowed: null"
        if counts:
            sizes = list(counts.model_dump().values())
            yield from disagreements(where, test, np.repeat([1.0, 1, 0, 0], sizes), np.repeat([1.0, 0, 1, 0], sizes))
        if test.proven != (proven := test.p <= (test.nominal or test.level)):
            yield f"{where}.proven: got {test.proven}; allowed: {proven}, as p is {test.p:.3g}"


def _is_close(got: float, expected: float) -> bool:
    return math.isclose(got, expected, rel_tol=CLOSE, abs_tol=1e-9)


def disagreements(where: str, test: StatedTest, dense: Array, small: Array) -> Iterator[str]:
    """The figures of a test that do not follow from the answers of both models, as error messages."""
    counts = evaluation.counts_of(dense, small)
    if (stated := test.counts and test.counts.model_dump()) != (expected := counts and asdict(counts)):
        yield f"{where}.counts: got {stated}; allowed: {expected}, by the answers"
    losses = dense - small
    figures = {
        "dense": float(np.mean(dense)),
        "small": float(np.mean(small)),
        "loss": float(np.mean(dense)) - float(np.mean(small)),
        "p": evaluation.p_value(losses, test.margin),
        "bound": evaluation.loss_bound(losses, test.nominal or test.level),
    }
    for field, value in figures.items():
        if not _is_close(got := getattr(test, field), value):
            yield f"{where}.{field}: got {got:.6g}; allowed: {value:.6g}, by the answers"


def parse_certificate(content: bytes, where: str) -> CertificateFile:
    """The certificate in the bytes of its file; `where` names it in errors.

    Raises:
        InputError: it says what it may not, leaves something out, or contradicts itself.
    """
    try:
        parsed = json.loads(content) if len(content) <= LARGEST else None
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise InputError(f"{where}: got {len(content):,} bytes; allowed: the certificate of a proven model, as JSON")
    try:
        return validate_as(CertificateFile, parsed)
    except InputError as error:
        raise InputError(f"{where}: {str(error)[:1000]}") from None
