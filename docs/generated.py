"""Writes the pages that say what code and tables say: configuration, command line and results.

    python docs/generated.py            # write them (`make pages`)
    python docs/generated.py --check    # fail if one of them is stale (`make docs`)

They are plain Markdown, committed, and read the same on a code host and on the site. What stands above the marker in a
page is written by hand and stays.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from typer.cli import get_docs_for_click
from typer.main import get_command

from claims import Study, read_claims
from tailored_llama.cli.main import app as typer_app
from tailored_llama.config import RunConfig, Section, SmallestConfig, SweepConfig
from tailored_llama.models import FAMILIES
from tailored_llama.pipeline import COMPOSITIONS

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
STATED = ("error", "seeds", "examples", "commit", "machine", "repetitions")
REASON = "none: "  # what a value begins with that says why there is none
MARKER = "<!-- What follows is written by docs/generated.py: run `make pages`. -->"
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
KINDS = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "null": "absent"}


def configuration() -> Iterator[str]:
    """Every field of a configuration, by section: its kind, what is allowed, its default and its description."""
    schema = RunConfig.model_json_schema()
    own = ("benchmarks", "seed")
    yield from ("## The file", "Beside the sections, two fields stand at the top of the file:")
    yield from _fields(schema, schema, "", own)
    for name, section in schema["properties"].items():
        if name not in own:
            yield from _section(schema, f"`[{name}]`", f"{name}.", section["$ref"])
    yield from _section(schema, "`[[benchmarks]]`", "benchmarks.", "#/$defs/BenchmarkConfig")
    yield "## The smallest model"
    yield f"`tailored-llama smallest` and the flow `smallest`. {_changed_defaults(SmallestConfig())}"
    goal = SmallestConfig.model_json_schema()
    yield from _section(goal, "`[goal]`", "goal.", goal["properties"]["goal"]["$ref"])
    sweep = SweepConfig.model_json_schema()
    yield from ("## Sweeps", "Fields at the top of the file, beside those of a run:")
    yield from _fields(sweep, sweep, "", [name for name in sweep["properties"] if name not in RunConfig.model_fields])


def _section(schema: dict[str, Any], title: str, prefix: str, ref: str) -> Iterator[str]:
    section = _resolved(schema, {"$ref": ref})
    yield from (f"## {title}", section["description"])
    yield from _fields(schema, section, prefix)


def _fields(schema: dict[str, Any], section: dict[str, Any], prefix: str, names: Any = None) -> Iterator[str]:
    for name in section["properties"] if names is None else names:
        field = section["properties"][name]
        default = "required" if "default" not in field else _value(field["default"])
        kind = _kind(schema, field)
        about = " ".join(field.get("description", "").split())
        yield f"- **`{prefix}{name}`**: {kind}. Default: {default}.  \n  {about}".rstrip()


def _kind(schema: dict[str, Any], field: dict[str, Any]) -> str:
    """What a value may be, in words."""
    field = _resolved(schema, field)
    if "anyOf" in field:
        return ", or ".join(_kind(schema, one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field or "const" in field:
        return " | ".join(_value(one) for one in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of: {_kind(schema, field.get('items', {'type': 'string'}))}"
    if field["type"] == "object":
        return "table"
    return ", ".join([KINDS[field["type"]], *(f"{BOUNDS[key]} {field[key]:,}" for key in BOUNDS if key in field)])


def _resolved(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][field["$ref"].rsplit("/", 1)[1]] if "$ref" in field else field


def _value(value: Any) -> str:
    """A value as TOML has it; a table is shown by its fields that are set."""
    if value is None:
        return "absent"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = [one["name"] for one in value]
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _changed_defaults(section: Section) -> str:
    """Where a search's defaults differ from a run's."""
    usual, found = RunConfig(), []
    for part in RunConfig.model_fields:
        mine, other = getattr(section, part), getattr(usual, part)
        for name in getattr(type(mine), "model_fields", ()):
            if getattr(mine, name) != getattr(other, name):
                value = getattr(mine, name)
                found.append(f"`{part}.{name}` is {_value(list(value) if isinstance(value, tuple) else value)}")
    return f"Its defaults are a run's, except that {' and '.join(found)}."


def command_line() -> Iterator[str]:
    """What Typer writes of the commands, one level of headings lower, and the flows."""
    command = get_command(typer_app)
    context = command.make_context("tailored-llama", [], resilient_parsing=True)
    yield get_docs_for_click(obj=command, ctx=context, indent=1, name="tailored-llama")
    yield "## `python -m flows`"
    yield "In a checkout, `python -m flows NAME CONFIG.toml --set KEY=VALUE` runs a composition as a Prefect flow:"
    rows = [[f"`{name}`", own.about, f"`{own.example}`"] for name, own in COMPOSITIONS.items()]
    yield _table([["name", "what it does", "example"], *rows])


def architectures() -> Iterator[str]:
    """A row for each model type: what can leave, whether GGUF files of it are read, and as what they are written."""
    rows = [["model_type", "what leaves", "read from GGUF", "llama.cpp's architecture"]]
    for name, family in FAMILIES.items():
        leaves = {"all": "tokens, heads, channels", "channels": "tokens, channels"}.get(family.level, family.level)
        written = f"{family.gguf}, by its converter" if family.converted else family.gguf
        rows.append([f"`{name}`", leaves, "yes" if family.gguf and family.from_gguf else "", written])
    yield _table(rows)


def results() -> Iterator[str]:
    """Every claim with its figure, and below, the table of each study with its conditions and its command."""
    parts = read_claims(RESULTS / "claims.toml")
    for part in parts:
        yield f"## {part.title}"
        rows = [["claim", "figure", "seeds", "examples", "study"]]
        for study in part.study:
            for claim in study.claim:
                figure = f"{claim.figure}\u00a0±\u00a0{claim.error}" if claim.error[0].isdigit() else claim.figure
                cells = [claim.claim, figure, *(_short(one) for one in (claim.seeds, claim.examples))]
                rows.append([*cells, f"[{study.title}](#{study.id})"])
        yield _table(rows)
    for part in parts:
        yield f"## Studies: {part.title.lower()}"
        for study in part.study:
            yield from _study(study)


def _study(study: Study) -> Iterator[str]:
    """A study's conditions, how each claim came about, the commands and the tables."""
    yield f'<a id="{study.id}"></a>'
    yield f"### {study.title}"
    yield study.conditions
    shared, *own = _provenance(study)
    yield from (part for part in (shared, "\n".join(own)) if part)
    for command in dict.fromkeys(claim.command for claim in study.claim if not claim.command.startswith(REASON)):
        yield f"```sh\n{command.strip()}\n```"
    if study.picture:
        yield f"![{study.title}](../images/{study.picture})"
    for name in study.csv:
        with (RESULTS / name).open(encoding="utf-8", newline="") as file:
            yield _table(_shown(list(csv.reader(file))))
        yield f"[{name}]({name})"


def _provenance(study: Study) -> Iterator[str]:
    """What holds for all claims of a study, and below, what a claim has instead; errors stand in the figures."""
    shared = [f"{name.capitalize()}: {_said(value)}." for name in STATED if (value := getattr(study, name))]
    yield " ".join(one for one in shared if one != "Error: in the figure.")
    for claim in study.claim:
        own = {name: value for name in STATED if (value := getattr(claim, name)) != getattr(study, name)}
        if not own.get("error", REASON).startswith(REASON):
            del own["error"]  # a number stands beside its figure
        if claim.command.startswith(REASON):
            own["command"] = claim.command
        if own:
            yield f"- {claim.claim}: {'; '.join(f'{name}: {_said(value)}' for name, value in own.items())}."


def _said(value: str) -> str:
    """A value in a sentence: `none: a timing` is written `none (a timing)`."""
    return re.sub("^none: (.*)$", r"none (\1)", value)


def _short(value: str) -> str:
    """A reason why something does not apply stands in the study; the table of claims has a dash."""
    return "–" if value.startswith(REASON) else value


def _shown(rows: list[list[str]]) -> list[list[str]]:
    """A study's rows for a reader: an error or an interval stands beside its figure, and the study says the rest."""
    columns: list[list[str]] = []
    for head, *written in zip(*rows, strict=True):
        cells = [
            f"{int(cell):,}" if cell.isdigit() else cell.replace("-", "−") if "-" in cell[:1] else cell
            for cell in written
        ]
        if head.endswith(" error"):
            columns[-1][1:] = [f"{a} ± {b}" if b else a for a, b in zip(columns[-1][1:], cells, strict=True)]
        elif head.endswith((" low", " high")):
            ends = "({}," if head.endswith(" low") else "{})"
            columns[-1][1:] = [f"{a} {ends.format(b)}" if b else a for a, b in zip(columns[-1][1:], cells, strict=True)]
        elif head not in ("seeds", "examples") or len(set(cells)) > 1:
            columns.append([head, *cells])
    return [list(row) for row in zip(*columns, strict=True)]


def _table(rows: list[list[str]]) -> str:
    """A Markdown table; columns of figures stand right."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = [
        "--:" if all(re.match(r"[-+−]?\d|$", cell) for cell in column) else ":--" for column in zip(*body, strict=True)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


PAGES: dict[str, Callable[[], Iterator[str]]] = {
    "reference/configuration.md": configuration,
    "reference/command-line.md": command_line,
    "reference/models.md": architectures,
    "results/index.md": results,
}


def page(name: str) -> str:
    """A page as it should be: the part that is written by hand, and below the marker what code and tables say."""
    by_hand, marker, _ = (DOCS / name).read_text(encoding="utf-8").partition(MARKER)
    if not marker:
        raise ValueError(f"docs/{name}: got no line {MARKER!r}; allowed: one, below which the page is generated")
    lines = "\n\n".join([f"{by_hand}{MARKER}", *PAGES[name]()]).splitlines()
    return "\n".join(line if line.endswith(".  ") else line.rstrip() for line in lines) + "\n"


def main() -> None:
    try:
        pages = {name: page(name) for name in PAGES}
    except ValueError as error:
        sys.exit(str(error))
    stale = [name for name, text in pages.items() if (DOCS / name).read_text(encoding="utf-8") != text]
    if sys.argv[1:] == ["--check"]:
        if stale:
            sys.exit(f"{', '.join(f'docs/{name}' for name in stale)}: not what code and tables say; run `make pages`")
        return
    for name in stale:
        (DOCS / name).write_text(pages[name], encoding="utf-8")


if __name__ == "__main__":
    main()
