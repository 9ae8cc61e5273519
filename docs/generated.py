"""A Sphinx extension: pages that are made from the code and from the studies' tables when the site is built."""

import csv
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.cli import get_docs_for_click
from typer.main import get_command

from tailored_llama.cli.main import app as typer_app
from tailored_llama.config import PromptStudyConfig, RunConfig, Section, SmallestConfig, SweepConfig
from tailored_llama.pipeline import COMPOSITIONS

RESULTS = Path(__file__).parent / "results"
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
    yield "## Texts of a mixture"
    yield "`calibration.source` and `healing.source` take a list of texts, each a name or a table with these fields:"
    yield from _fields(schema, schema["$defs"]["SourceConfig"], "source.")
    yield "## The smallest model"
    yield f"`tailored-llama smallest` and the flow `smallest`. {_changed_defaults(SmallestConfig())}"
    goal = SmallestConfig.model_json_schema()
    yield from _section(goal, "`[goal]`", "goal.", goal["properties"]["goal"]["$ref"])
    for title, model in (("Sweeps", SweepConfig), ("Prompt studies", PromptStudyConfig)):
        study = model.model_json_schema()
        yield from (f"## {title}", "Fields at the top of the file, beside those of a run:")
        yield from _fields(
            study, study, "", [name for name in study["properties"] if name not in RunConfig.model_fields]
        )


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
        yield f"```{{confval}} {prefix}{name}\n\n{kind[:1].upper()}{kind[1:]}. Default: {default}.\n\n{about}\n```"


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


def results() -> Iterator[str]:
    """Every claim with its figure, and below, the table of each study with its conditions and its command."""
    parts = tomllib.loads((RESULTS / "claims.toml").read_text(encoding="utf-8"))["part"]
    for part in parts:
        yield f"## {part['title']}"
        rows = [["claim", "figure", "seeds", "examples", "study"]]
        for study in part["study"]:
            for claim in study["claim"]:
                figure = "\u00a0±\u00a0".join(claim[key] for key in ("figure", "error") if key in claim)
                drawn = [(study | claim).get(key, "") for key in ("seeds", "examples")]
                rows.append([claim["claim"], figure, *drawn, f"[{study['title']}](#{study['id']})"])
        yield _table(rows)
    for part in parts:
        yield f"## Studies: {part['title'].lower()}"
        for study in part["study"]:
            yield from _study(study)


def _study(study: dict[str, Any]) -> Iterator[str]:
    """A study's conditions, command and tables."""
    yield f"({study['id']})=\n### {study['title']}"
    about = [f"{name}: {study[name.lower()]}" for name in ("Seeds", "Examples", "Commit") if name.lower() in study]
    yield study["conditions"] + (f" {'. '.join(about)}." if about else "")
    if "command" in study:
        yield f"```sh\n{study['command'].strip()}\n```"
    if "picture" in study:
        yield f"![{study['title']}](../images/{study['picture']})"
    for name in study["csv"]:
        with (RESULTS / name).open(encoding="utf-8", newline="") as file:
            yield _table(_shown(list(csv.reader(file))))
        yield f"[{name}]({name})"


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


def _directive(written: Callable[[], Iterator[str]]) -> type[SphinxDirective]:
    """A directive that stands for Markdown which a function writes."""

    class Generated(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            self.env.note_reread()  # what it is made from is no file that Sphinx watches
            return self.parse_text_to_nodes("\n\n".join(written()), allow_section_headings=True)

    return Generated


def setup(app: Sphinx) -> dict[str, bool]:
    for name, written in (("configuration", configuration), ("command-line", command_line), ("results", results)):
        app.add_directive(name, _directive(written))
    return {"parallel_read_safe": True}
