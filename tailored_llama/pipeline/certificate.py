"""The certificate of a proven model, as it is read: what it may say, and whether it agrees with itself.

Whoever publishes a model writes its certificate, so nothing in it is trusted. It names rows, prompts and figures.
Nothing that it names is run, and no file is opened that is not beside it.
"""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field

from tailored_llama import evaluation
from tailored_llama.config import Section, validate_as
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Array
from tailored_llama.store import is_safe_relative

LARGEST = 4_000_000  # bytes
CLOSE = 1e-6  # other versions of SciPy differ by less


def _in_folder(name: str) -> str:
    if not is_safe_relative(name):
        raise ValueError("allowed: a file in the folder")
    return name


Rows = Annotated[int, Field(ge=0, le=1_000_000)]
Text = Annotated[str, Field(max_length=2000, pattern=r"^\P{Cc}*$")]  # one line, and nothing that moves a cursor
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(_in_folder)]
Counts = Annotated[dict[Literal["both", "only_dense", "only_small", "neither"], Rows], Field(min_length=4)]
Settings = dict[str, Any]


class Stated(Section):
    """Base of all parts: values have their types already, and figures are numbers."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class StatedLook(Stated):
    """`evaluation.Look`."""

    rows: Rows = Field(ge=2)
    level: float = Field(gt=0, lt=1)


class StatedTest(Stated):
    """`evaluation.LossTest`, with what follows from it."""

    rows: Rows = Field(ge=2)
    margin: float
    level: float
    nominal: float | None = None
    dense: float
    small: float
    loss: float
    bound: float
    p: float
    bootstrap: float = 0.0  # of earlier proofs; it decided nothing
    counts: Counts | None
    looks: list[StatedLook] = Field(default_factory=list, max_length=evaluation.LOOKS)
    missing: Rows = 0
    proven: bool

    @property
    def answers(self) -> tuple[Array, Array] | None:
        """Answers of the reference and of the model that have its counts."""
        if not (counts := self.counts):
            return None
        sizes = counts["both"], counts["only_dense"], counts["only_small"], counts["neither"]
        return np.repeat([1.0, 1, 0, 0], sizes), np.repeat([1.0, 0, 1, 0], sizes)


class StatedStep(Stated):
    """A candidate that was tested."""

    candidate: Text
    proven: bool
    benchmarks: dict[Text, StatedTest]


class StatedRows(Stated):
    """`evaluation.RowSet`."""

    rows: Rows
    sha256: Sha256


class StatedServing(Stated):
    """How the proving rows were asked: in a chat, by the prompt itself, or by log-likelihoods of the choices."""

    asked: Literal["chat", "prompt", "log-likelihoods"]
    runtime: Text
    template: Sha256 | None = None  # of the chat template
    unended: Rows = 0  # answers that only the limit of tokens ended


class StatedModel(Stated):
    """The model and the files that it consists of."""

    candidate: Settings  # for people
    name: Text
    bytes: int = Field(ge=0, lt=2**53)
    sha256: dict[FileName, Sha256] = Field(min_length=1)


class StatedRun(Stated):
    """The settings of the search: those that ask the rows, which `read_certificate` reads, and others for people."""

    model_config = ConfigDict(extra="allow")

    benchmarks: list[Settings] = Field(min_length=1)
    seed: int
    prompts: Settings
    scoring: Settings
    model: Settings
    goal: Settings

    def contradictions(self) -> Iterator[str]:
        for key in sorted({"execution", "store"} & (self.model_extra or {}).keys()):
            yield f"run.{key}: unknown key; allowed: settings of how the model was made"


class CertificateFile(Stated):
    """`certificate.json`."""

    format: Literal[2]
    claim: Text
    margin_points: float = Field(gt=0, lt=100)
    measure: Literal["accuracy"]
    confidence: float = Field(ge=0.5, lt=1)
    label_errors: float = Field(0.0, ge=0, lt=0.5)
    level: float
    opening: int = Field(ge=1, le=100)
    record: Text
    reference: Text
    benchmarks: dict[Text, StatedTest] = Field(min_length=1)
    sequence: list[StatedStep] = Field(min_length=1)
    sets: dict[Text, dict[Literal["tuning", "choosing", "proving"], StatedRows]]
    scoring: Settings
    model: StatedModel
    served: dict[Text, StatedServing]
    libraries: dict[str, Text]
    run: StatedRun

    def contradictions(self) -> Iterator[str]:
        names, because = sorted(self.benchmarks), "as in benchmarks"
        yield from _differs("sets", sorted(self.sets), names, because)
        yield from _differs("run.benchmarks", sorted(str(b.get("name")) for b in self.run.benchmarks), names, because)
        level = evaluation.level_of(self.opening, self.confidence)
        yield from _differs("level", self.level, level, f"at opening {self.opening} and this confidence")
        for number, step in enumerate(self.sequence):
            where = f"sequence.{number}"
            yield from _differs(f"{where}.benchmarks", sorted(step.benchmarks), names, because)
            for name, test in step.benchmarks.items():
                yield from self.faults(f"{where}.benchmarks.{name}", name, test, test.answers)
            proven = all(test.proven for test in step.benchmarks.values())
            yield from _differs(f"{where}.proven", step.proven, proven, "by its tests")
            if not proven and step is not self.sequence[-1]:
                yield f"{where}.proven: got False; allowed: at the end alone, as the first failure ends the sequence"
        proven_steps = [step for step in self.sequence if step.proven]
        if not proven_steps or proven_steps[-1].benchmarks != self.benchmarks:
            yield "benchmarks: got figures of no proven model; allowed: those of the last proven one of sequence"

    def faults(self, where: str, name: str, test: StatedTest, answers: tuple[Array, Array] | None) -> Iterator[str]:
        """What is wrong with a test on a benchmark, which `where` names, by the whole and the answers of both models.

        Later messages may follow from the first one, which is the one to show.
        """
        proving = self.sets[name].get("proving")
        planned = test.looks[-1].rows if test.looks else test.rows
        unlabelled = any(own.get("name") == name and own.get("unlabelled") for own in self.run.benchmarks)
        stops = evaluation.look_rows(planned) if unlabelled else ()
        yield from _differs(f"{where}.looks", [look.rows for look in test.looks], [*stops], "as they were planned")
        if unlabelled and not test.counts:
            yield f"{where}.counts: not set; allowed: those of the answers, as rows are not labelled"
        yield from _differs(f"{where}.rows", planned, proving.rows if proving else 0, "by the sets")
        margin = self.margin_points / 100 * (1 - 2 * self.label_errors)
        yield from _differs(f"{where}.margin", test.margin, margin, "as for the whole")
        yield from _differs(f"{where}.level", test.level, self.level, "as for the whole")
        if not test.counts:
            yield from _differs(f"{where}.nominal", test.nominal, None, "without counts")
        else:
            allowed = _planned_level(test)
            size = evaluation.exact_size(test.rows, test.margin, test.nominal) if test.nominal else 1.0
            if size > allowed * (1 + CLOSE):
                yield f"{where}.nominal: got {test.nominal}; allowed: at most what keeps the level {allowed:.4g}"
        level = test.nominal or test.level
        if test.missing > (test.counts["only_dense"] if test.looks and test.counts else 0):
            yield f"{where}.missing: got {test.missing}; allowed: at most the rows that only the reference gets right"
        if answers:
            yield from _differs(f"{where}.rows", test.rows, len(answers[0]), "by the answers")
            counts, losses = evaluation.counts_of(*answers), np.subtract(*answers)
            dense, small = (float(np.mean(values)) for values in answers)
            figures = {"counts": counts and asdict(counts), "dense": dense, "small": small, "loss": dense - small}
            figures |= {"p": evaluation.p_value(losses, test.margin), "bound": evaluation.loss_bound(losses, level)}
            for field, value in figures.items():
                yield from _differs(f"{where}.{field}", getattr(test, field), value, "by the answers")
        yield from _differs(f"{where}.proven", test.proven, test.p <= level, f"as p is {test.p:.3g}")


def _planned_level(test: StatedTest) -> float:
    """The level that a test may use: the whole one, or that of its look; 0: no such look was planned."""
    if not test.looks:
        return test.level
    own, levels = (test.rows, test.nominal), evaluation.look_levels(test.level)[-len(test.looks) :]
    planned = [level for look, level in zip(test.looks, levels, strict=True) if (look.rows, look.level) == own]
    return max(planned, default=0.0)


def _differs(field: str, got: Any, expected: Any, because: str) -> Iterator[str]:
    """An error message unless a field has the expected value, or a number close to it."""
    are_numbers = isinstance(got, float) and isinstance(expected, float)
    if got != expected and not (are_numbers and math.isclose(got, expected, rel_tol=CLOSE, abs_tol=1e-9)):
        told = [f"{value:.6g}" if isinstance(value, float) else value for value in (got, expected)]
        yield f"{field}: got {told[0]}; allowed: {told[1]}, {because}"


def parse_certificate(content: bytes, where: str) -> CertificateFile:
    """The certificate in the bytes of its file; `where` names it in errors.

    Raises:
        InputError: it says what it may not, leaves something out, or contradicts itself.
    """
    parsed = None
    if len(content) <= LARGEST:
        with suppress(ValueError, RecursionError):
            parsed = json.loads(content)
    if not isinstance(parsed, dict):
        raise InputError(f"{where}: got {len(content):,} bytes; allowed: the certificate of a proven model, as JSON")
    try:
        return validate_as(CertificateFile, parsed)
    except InputError as error:
        raise InputError(f"{where}: {str(error)[:1000]}") from None
