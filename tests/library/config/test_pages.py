"""The pages keep up with the code: configurations load, and the settings that they name exist."""

import csv
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import claims
import generated
from tailored_llama.config import Section, SmallestConfig, SweepConfig, validate_as
from tailored_llama.data import load_template

ROOT = Path(__file__).parents[3]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / folder / "README.md" for folder in ("data", "deployments")),
    *sorted((ROOT / "docs").glob("*/*.md")),
]
CLAIM = """
[[part]]
title = "A part"
[[part.study]]
id = "a-study"
title = "A study"
conditions = "Some."
csv = []
[[part.study.claim]]
claim = "It gains"
figure = "+2.0 points"
error = "1.2"
seeds = "0"
examples = "200"
commit = "5143fa5"
command = "make quickstart"
"""
STUDIES = (SmallestConfig, SweepConfig)
RESULTS = ROOT / "docs/results/index.md"  # names settings and options as they were at the commit of each figure
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
current_pages = pytest.mark.parametrize(
    "page", [page for page in PAGES if page != RESULTS], ids=lambda path: str(path.relative_to(ROOT))
)


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def fields(section: type[Section]) -> Iterator[str]:
    """The dotted names of all fields, those of `[[benchmarks]]` among them."""
    for name, field in section.model_fields.items():
        yield name
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        kinds += [inner for kind in kinds for inner in getattr(kind, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from (f"{name}.{inner}" for inner in fields(kind))


KNOWN = {name for study in STUDIES for name in fields(study)}
SECTIONS = {name.split(".")[0] for name in KNOWN if "." in name}


@pages
def test_a_configuration_loads(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-tasks").mkdir()
    for task in blocks(page, "yaml"):
        name = task.split("task: ")[1].split()[0]
        (tmp_path / "my-tasks" / f"{name}.yaml").write_text(task)
    for block in blocks(page, "toml"):
        data: dict[str, Any] = tomllib.loads(block)
        if "own" in data:  # a template set
            (tmp_path / "set.toml").write_text(block)
            load_template("set.toml")
        else:
            validate_as(SweepConfig if "grid" in data else SmallestConfig, data)


@pages
def test_a_file_that_is_linked_exists(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pages
def test_an_anchor_that_is_linked_exists_on_a_code_host(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text())
    assert not [(file, anchor) for file, anchor in links if anchor not in anchors(page.parent / file if file else page)]


def anchors(page: Path) -> set[str]:
    """The anchors that a code host gives a page: its headings in lower case with dashes, and what `<a id>` names."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings} | set(
        re.findall(r'<a id="([^"]+)">', text)
    )


@pytest.mark.parametrize("page", generated.PAGES)
def test_a_generated_page_says_what_the_code_and_the_tables_say(page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == generated.page(page), "run `make pages`"


@pytest.mark.parametrize(
    ("page", "table"), [("README.md", "search.csv"), ("docs/tutorials/own-model.md", "fields-search.csv")]
)
def test_a_search_that_a_page_shows_is_that_of_the_results(page: str, table: str) -> None:
    line = r"^\S+\s+(?:–|(\d+)\s%)\s(as it is|\w+)\s+(\d+)\sMB\s+([−\d.]+)\s(.+)$"  # some of the spaces do not break
    shown = re.findall(line, (ROOT / page).read_text(), flags=re.MULTILINE)
    rows = [list(row.values())[1:6] for row in results(table)]
    assert [[cell.replace("−", "-") for cell in row] for row in shown[: len(rows)]] == rows  # a page's first one


@pytest.mark.parametrize(("base", "table"), [("Gemma", "search.csv"), ("SmolLM2", "fields-search.csv")])
def test_prune_or_quantise_shows_candidates_of_the_newest_searches(base: str, table: str) -> None:
    shown, of_search = (
        [[row[column] for column in ("MB", "removed %", "type", "loss on the choosing rows, points")] for row in rows]
        for rows in ([r for r in results("prune-or-quantise.csv") if r["base"].startswith(base)], results(table))
    )
    assert shown
    assert not [row for row in shown if row not in of_search]


def results(table: str) -> list[dict[str, str]]:
    with (ROOT / "docs/results" / table).open(newline="") as file:
        return [*csv.DictReader(file)]


@pytest.mark.parametrize("field", ["error", "seeds", "examples", "commit", "command"])
def test_a_claim_without_a_field_is_not_built(field: str, tmp_path: Path) -> None:
    (tmp_path / "claims.toml").write_text(re.sub(rf"(?m)^{field} = .*\n", "", CLAIM))
    with pytest.raises(ValueError, match=rf"^claims\.toml: A part, a-study, It gains: {field}: not set; allowed: "):
        claims.read_claims(tmp_path / "claims.toml")


def test_a_timing_without_its_machine_is_not_built(tmp_path: Path) -> None:
    (tmp_path / "claims.toml").write_text(CLAIM.replace('seeds = "0"', 'seeds = "none: a timing"'))
    with pytest.raises(ValueError, match="machine, repetitions: not set"):
        claims.read_claims(tmp_path / "claims.toml")


@current_pages
def test_a_setting_exists(page: Path) -> None:
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})\.[a-z_]+)(?![\w(/.])", page.read_text())
    files = re.compile(r"\.(toml|md|py|csv|parquet|json|html|gguf|txt)$")
    assert {name for name in named if not files.search(name)} <= KNOWN
