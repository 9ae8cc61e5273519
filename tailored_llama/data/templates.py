"""Template sets: how the examples of every benchmark are worded, as TOML files that people can read and add to."""

import string
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from tailored_llama.config import BenchmarkConfig, Section, is_json, is_written, read_config_data, validate_as
from tailored_llama.data.builtin import BUILTIN, SEVEN
from tailored_llama.errors import InputError

FOLDER = Path(__file__).parent / "template_sets"  # a link to data/prompts in a checkout, a copy in a wheel
LETTERS = string.ascii_uppercase
TABLES = ("own", *SEVEN)
_CHOICES = ("choice", "choices[0]", "choices[1]", "listed", "letter")  # every example has at least two choices


class Layout(Section):
    """The layout of a benchmark's examples as text.

    Both format strings may name the example's fields (`context` for custom benchmarks), `choice` (the choice being
    written out), `choices[0]` and `choices[1]`, `listed` (all choices, one per line, each formatted by `shown`) and
    `letter` (the choice's letter in that list). The space between the two is added and belongs to the continuation.
    """

    layout: str = Field(min_length=1, description="The context: what the model reads.")
    continuation: str = Field("{choice}", min_length=1, description="What is scored after the context.")
    instruction: str | None = Field(None, min_length=1)
    """A sentence put before the question, or before the solved examples."""


class Template(Section):
    """A template set: its layouts for the seven benchmarks, and one for custom benchmarks."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$", description="The set's name in tables and reports.")
    source: str = Field(min_length=1, description="Where the wording comes from.")
    specific: bool = False
    """Whether its instructions state each benchmark's own task, which a benchmark's `instruction` then replaces."""
    shown: str = Field("{letter}. {choice}", min_length=1, description="Format of each choice in `listed`.")
    own: Layout | None = None
    boolq: Layout | None = None
    piqa: Layout | None = None
    hellaswag: Layout | None = None
    winogrande: Layout | None = None
    arc_easy: Layout | None = None
    arc_challenge: Layout | None = None
    openbookqa: Layout | None = None

    def contradictions(self) -> Iterator[str]:
        yield from _unknown_names("shown", self.shown, ("letter", "choice"))
        for table in TABLES:
            if layout := getattr(self, table):
                fields = BUILTIN[table].fields if table in SEVEN else ("context",)
                yield from _mistakes(table, layout, (*fields, *_CHOICES))


def _mistakes(table: str, layout: Layout, allowed: tuple[str, ...]) -> Iterator[str]:
    """Yield what is wrong with a layout; what follows the first message may assume that it was not there."""
    yield from _unknown_names(f"{table}.layout", layout.layout, allowed)
    yield from _unknown_names(f"{table}.continuation", layout.continuation, allowed)
    if (last := layout.layout[-1]).isspace():
        hint = "no space at its end (the one before the continuation is added)"
        yield f"{table}.layout: ends with {last!r}; allowed: {hint}"
    read, scored = names_in(layout.layout), names_in(layout.continuation)
    if not {"choice", "letter"} & (read | scored):
        yield f"{table}: all choices are written alike; allowed: {{choice}} or {{letter}} in one of its strings"
    if "letter" in scored and "listed" not in read:
        yield f"{table}.continuation: got {{letter}}; allowed: only with {{listed}} in the layout"


def _unknown_names(field: str, text: str, allowed: tuple[str, ...]) -> Iterator[str]:
    """Return what a format string has beside plain, known names."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        yield f"{field}: got {text!r}, {error}; allowed: names in braces"
        return
    for _, name, spec, conversion in parts:
        if name is not None and (name not in allowed or spec or conversion):
            got = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            yield f"{field}: got {{{got}}}; allowed: {', '.join(allowed)}"


def names_in(text: str) -> set[str]:
    """The names in a format string."""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def shipped() -> list[str]:
    """The names of the template sets that come with the library."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_template(source: str) -> Template:
    """Read a template set: a shipped one by its name, or a TOML file by its path.

    InputError: the set or file does not exist, is not TOML, or has an unknown key or an invalid layout.
    """
    names = shipped()
    if source in names:
        path = FOLDER / f"{source}.toml"
    elif (path := Path(source).expanduser()).suffix != ".toml" or not path.is_file():
        kind = "file" if path.suffix == ".toml" else "template set"
        raise InputError(
            f"prompts.template: got {source!r}, no such {kind}; allowed: {', '.join(names)}, or a .toml file"
        )
    data = read_config_data(path)
    try:
        return validate_as(Template, data)
    except InputError as error:
        raise InputError(f"prompts.template {path}: {error}") from None


def layout_of(template: Template, benchmark: BenchmarkConfig) -> Layout:
    """A set's layout for a benchmark, with the instruction in effect; InputError: it has none, or tells the answers."""
    table = benchmark.name if benchmark.name in SEVEN else "own"
    layout: Layout | None = getattr(template, table)
    if layout is None:
        tables = [name for name in TABLES if getattr(template, name)]
        raise InputError(f"template {template.name}: no table [{table}]; present: {', '.join(tables) or 'none'}")
    shows_choices = not names_in(layout.layout).isdisjoint(_CHOICES) or layout.continuation != "{choice}"
    if is_written(benchmark) and shows_choices:  # the answer is the only choice
        raise InputError(
            f"template {template.name}: shows the choices; allowed: a set without choices, since the model writes the "
            f"answers of {benchmark.name}"
        )
    if is_json(benchmark):  # a schema allows no space before JSON, so none is tuned
        layout = layout.model_copy(update={"layout": f"{layout.layout}\n"})
    if not template.specific and benchmark.form != "messages":  # a system message is part of every prompt
        return layout
    return layout.model_copy(update={"instruction": benchmark.instruction or layout.instruction})
