"""What a claim of `results/claims.toml` has to state: the page of results is not built from one that leaves it out."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
REASON = r"none: \S.*"  # what does not apply says why
Error = Annotated[str, StringConstraints(pattern=rf"^(\d[\d.]*|in the figure|{REASON})$")]
Seeds = Annotated[str, StringConstraints(pattern=rf"^(\d[\d, –]*|{REASON})$")]
Examples = Annotated[str, StringConstraints(pattern=rf"^(\d.*|{REASON})$")]
Commit = Annotated[str, StringConstraints(pattern=rf"^((before )?[0-9a-f]{{7}}\b.*|{REASON})$")]
ALLOWED = {
    "error": "a number, 'in the figure', or 'none: ' and why",
    "seeds": "numbers, or 'none: ' and why",
    "examples": "a number, or 'none: ' and why",
    "commit": "seven digits of the commit that printed the figure, 'before ' and those, or 'none: ' and why",
    "command": "what prints the figure",
}
SHARED = ("error", "seeds", "examples", "commit", "command", "machine", "repetitions")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Claim(Strict):
    """A figure and how it came about. A field that means nothing for it has `none: ` and the reason."""

    claim: Text
    figure: Text
    error: Error
    seeds: Seeds
    examples: Examples
    commit: Commit
    command: Text
    machine: Text | None = None
    repetitions: Text | None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.error == "in the figure" and not any(mark in self.figure for mark in "±("):
            raise ValueError(
                f"error: got 'in the figure'; allowed: a figure with ± or an interval, not {self.figure!r}"
            )
        if self.seeds == "none: a timing" and not (self.machine and self.repetitions):
            raise ValueError("machine, repetitions: not set; a timing states both")
        return self


class Study(Strict):
    """The claims of one series of runs. What it states itself holds for all of them."""

    id: Text
    title: Text
    conditions: Text
    csv: list[Text]
    picture: Text | None = None
    claim: list[Claim] = Field(min_length=1)
    error: Error | None = None
    seeds: Seeds | None = None
    examples: Examples | None = None
    commit: Commit | None = None
    command: Text | None = None
    machine: Text | None = None
    repetitions: Text | None = None


class Part(Strict):
    title: Text
    study: list[Study] = Field(min_length=1)


class Claims(Strict):
    part: list[Part]


def read_claims(path: Path) -> list[Part]:
    """The parts of a file of claims; a ValueError names each claim and what it lacks, one on a line."""
    data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    for part in data["part"]:
        for study in part["study"]:
            shared = {name: study[name] for name in SHARED if name in study}
            study["claim"] = [shared | claim for claim in study.get("claim", [])]
    try:
        return Claims.model_validate(data).part
    except ValidationError as error:
        raise ValueError("\n".join(_line(path, data, dict(one)) for one in error.errors())) from None


def _line(path: Path, data: dict[str, Any], error: dict[str, Any]) -> str:
    """`claims.toml: PART, STUDY, CLAIM: FIELD: what is wrong`."""
    names, where = [], data
    for step in error["loc"]:
        where = where[step] if isinstance(where, list) else where.get(step)
        if not isinstance(where, (dict, list)):
            break
        if isinstance(where, dict):  # a part, a study or a claim
            names += [str(where[name]) for name in ("id", "title", "claim") if name in where][:1]
    field = error["loc"][-1]
    if error["type"] == "value_error":
        said = error["msg"].removeprefix("Value error, ")
    elif field not in ALLOWED:
        said = f"{field}: {error['msg']}"
    else:
        got = "not set" if error["type"] == "missing" else f"got {error['input']!r}"
        said = f"{field}: {got}; allowed: {ALLOWED[field]}"
    return f"{path.name}: {', '.join(names)}: {said}"
