"""Template sets: how the examples of every benchmark are worded, as files that people can read and add to.

A set is one TOML file; those shipped are in `data/prompts`. It has a name, says where its wording comes from, and has
a table for each benchmark it can word, with format strings over the example's fields. `prompts.py` fills them in.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, model_validator

from tailored_llama.config import BenchmarkConfig, RunConfig, Section
from tailored_llama.config_loading import read_config_data, validate_as
from tailored_llama.errors import InputError
from tailored_llama.own import is_written
from tailored_llama.seven import BUILTIN

Run = TypeVar("Run", bound=RunConfig)

FOLDER = Path(__file__).parent / "template_sets"  # in a checkout a link to data/prompts, in a wheel a copy
GENERIC = "generic"  # the set that says nothing of the task: what is tuned on several benchmarks at once reads it
LETTERS = string.ascii_uppercase
_CHOICES = ("choice", "choices[0]", "choices[1]", "listed", "letter")  # every example has two choices at least


class Layout(Section):
    """How a benchmark's examples are written out.

    Both format strings may name the example's fields (`context` for benchmarks of one's own), `choice` (the one that is
    written out), `choices[0]` and `choices[1]`, `listed` (all choices, one a line, as `shown` says) and `letter` (the
    choice's letter there). The space between the two belongs to the continuation and is put there.
    """

    layout: str = Field(min_length=1, description="The context: what the model reads.")
    continuation: str = Field("{choice}", min_length=1, description="What is scored after it.")
    instruction: str | None = Field(
        None, min_length=1, description="A sentence put before the question, or before the solved examples."
    )

    @property
    def in_context(self) -> set[str]:
        """What the context names."""
        return set(_names(self.layout))

    @property
    def in_continuation(self) -> set[str]:
        """What the continuation names."""
        return set(_names(self.continuation))


class Template(Section):
    """A template set: its layout for each of the seven, and for benchmarks of one's own."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$", description="What tables and reports call it.")
    source: str = Field(min_length=1, description="Where the wording comes from.")
    specific: bool = Field(
        False,
        description="Whether its instructions state each benchmark's own task. Then a benchmark's configured "
        "`instruction` takes the place of the set's, and there must be one of the two.",
    )
    shown: str = Field("{letter}. {choice}", min_length=1, description="How a choice stands in `listed`.")
    own: Layout | None = None
    boolq: Layout | None = None
    piqa: Layout | None = None
    hellaswag: Layout | None = None
    winogrande: Layout | None = None
    arc_easy: Layout | None = None
    arc_challenge: Layout | None = None
    openbookqa: Layout | None = None

    @model_validator(mode="after")
    def _can_be_filled_in(self) -> Template:
        _check_names("shown", self.shown, ("letter", "choice"))
        fields = {"own": ("context",), **{name: builtin.fields for name, builtin in BUILTIN.items()}}
        for table, allowed in fields.items():
            if layout := getattr(self, table):
                _check_layout(table, layout, (*allowed, *_CHOICES))
        return self


def shipped() -> list[str]:
    """The names of the sets that come with the library."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def worded(run: Run, template: str) -> Run:
    """A run with another template set."""
    return run.model_copy(update={"prompts": run.prompts.model_copy(update={"template": template})})


def load_template(source: str, field: str = "prompts.template") -> Template:
    """Read a template set.

    Args:
        source: a shipped set's name, or the path of a TOML file.
        field: the configuration field it is from, for error messages.

    Raises:
        InputError: no such set or file, not TOML, an unknown key, or a layout that cannot be filled in.
    """
    names = shipped()
    if source in names:
        path = FOLDER / f"{source}.toml"
    elif (path := Path(source).expanduser()).suffix != ".toml" or not path.is_file():
        near = difflib.get_close_matches(path.stem, names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        what = "file" if path.suffix == ".toml" else "template set"
        raise InputError(f"{field}: got {source!r}, no such {what}; allowed: {', '.join(names)}, or a .toml file{hint}")
    data = read_config_data(path)
    try:
        return validate_as(Template, data)
    except InputError as error:
        raise InputError(f"{field} {path}: {error}") from None


def layout_of(template: Template, benchmark: BenchmarkConfig) -> Layout:
    """A set's layout for a benchmark, with the instruction in effect.

    Raises:
        InputError: the set has none; it needs an instruction, and the benchmark has none; or it shows the choices where
            the model is to write the answer itself.
    """
    table = benchmark.name if benchmark.name in BUILTIN else "own"
    found: Layout | None = getattr(template, table)
    if found is None:
        tables = [name for name in ("own", *BUILTIN) if getattr(template, name)]
        raise InputError(f"template {template.name}: no table [{table}]; present: {', '.join(tables) or 'none'}")
    if is_written(benchmark) and shows_choices(template, benchmark):
        raise InputError(
            f"template {template.name}: shows the choices; allowed for {benchmark.name}, where the model writes the "
            "answer: a set that does not"
        )
    if not template.specific:
        return found
    if not (instruction := benchmark.instruction or found.instruction):
        raise InputError(
            f"benchmarks.{benchmark.name}.instruction: not set; allowed: a sentence that states the task, "
            f"which the template {template.name} puts before each question"
        )
    return found.model_copy(update={"instruction": instruction})


def shows_choices(template: Template, benchmark: BenchmarkConfig) -> bool:
    """Whether a set puts choices into the context, or scores anything but a choice's text."""
    found: Layout | None = getattr(template, benchmark.name if benchmark.name in BUILTIN else "own")
    return found is not None and (bool(found.in_context & set(_CHOICES)) or found.continuation != "{choice}")


def wording(template: Template, benchmark: BenchmarkConfig) -> dict[str, Any]:
    """All that prompts are made of besides the examples, for a cache key: the content, not the file or its path."""
    layout = layout_of(template, benchmark)
    return {
        "name": template.name,
        **layout.model_dump(),
        "shown": template.shown if "listed" in layout.in_context else None,
    }


def _check_layout(table: str, layout: Layout, allowed: tuple[str, ...]) -> None:
    _check_names(f"{table}.layout", layout.layout, allowed)
    _check_names(f"{table}.continuation", layout.continuation, allowed)
    if layout.layout[-1].isspace():
        raise ValueError(
            f"{table}.layout: ends with {layout.layout[-1]!r}; allowed: no space at its end (the one before the "
            "continuation is put there)"
        )
    if not {"choice", "letter"} & (layout.in_context | layout.in_continuation):
        raise ValueError(
            f"{table}: all choices are written alike; allowed: {{choice}} or {{letter}} in one of its texts"
        )
    if "letter" in layout.in_continuation and "listed" not in layout.in_context:
        raise ValueError(f"{table}.continuation: got {{letter}}; allowed: only with {{listed}} in the layout")


def _check_names(field: str, text: str, allowed: Iterable[str]) -> None:
    """Check that a format string has plain names only, all of them known."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{field}: got {text!r}, {error}; allowed: names in braces") from None
    for _, name, spec, conversion in parts:
        if name is not None and (name not in allowed or spec or conversion):
            got = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            near = difflib.get_close_matches(name, list(allowed), n=1)
            hint = f" (did you mean {near[0]}?)" if near and near[0] != name else ""
            raise ValueError(f"{field}: got {{{got}}}; allowed: {', '.join(allowed)}{hint}")


def _names(text: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
