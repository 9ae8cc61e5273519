"""Template sets: the shipped files, what is said of a bad one, what a cache key holds of one, where they are found."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tailored_llama.config import BenchmarkConfig
from tailored_llama.data import load_template
from tailored_llama.data.builtin import SEVEN
from tailored_llama.data.settings import Wording
from tailored_llama.data.templates import FOLDER, shipped
from tailored_llama.errors import InputError

ROOT = Path(__file__).parents[3]
HEAD = 'name = "mine"\nsource = "me"\n'


def written(folder: Path, tables: str, head: str = HEAD) -> str:
    (folder / "mine.toml").write_text(head + tables)
    return str(folder / "mine.toml")


def test_the_shipped_sets_are_the_files_of_data_prompts() -> None:
    assert FOLDER.resolve() == ROOT / "data" / "prompts"
    assert shipped() == ["generic", "harness", "lettered", "reread", "task", "task-2", "task-3"]
    assert [load_template(name).name for name in shipped()] == shipped()


@pytest.mark.parametrize("name", ["task", "task-2", "task-3", "reread", "lettered"])
def test_the_sets_that_state_the_task_state_each(name: str) -> None:
    found = load_template(name)
    assert found.specific
    instructions = {getattr(found, benchmark).instruction for benchmark in SEVEN}
    assert len(instructions - {None}) == len(SEVEN)


def test_rereading_is_the_task_with_the_question_twice() -> None:
    task, reread = load_template("task"), load_template("reread")
    for name in SEVEN:
        once, twice = getattr(task, name), getattr(reread, name)
        assert once.instruction == twice.instruction
        field = "sentence" if name == "winogrande" else "query" if name == "hellaswag" else "question"
        assert (once.layout.count(f"{{{field}}}"), twice.layout.count(f"{{{field}}}")) == (1, 2)


def test_a_set_of_one_s_own_may_word_one_benchmark_only(tmp_path: Path) -> None:
    path = written(tmp_path, '[piqa]\nlayout = """\nTo {question}\none should"""\ncontinuation = "do this: {choice}"\n')
    found = Wording(path, BenchmarkConfig(name="piqa")).identity()
    assert found == {
        "template": "mine", "layout": "To {question}\none should", "continuation": "do this: {choice}",
        "instruction": None, "shown": None, "name": "piqa", "context": None, "choices": None, "form": None,
        "metric": None, "stop": None, "max_new_tokens": None,
    }  # fmt: skip


def test_a_key_holds_what_is_rendered_and_nothing_else(tmp_path: Path) -> None:
    def wording(template: str, benchmark: str = "piqa", **changes: Any) -> dict[str, Any]:
        return Wording(template, BenchmarkConfig(name=benchmark, **changes)).identity()

    text = (ROOT / "data" / "prompts" / "task.toml").read_text()
    (tmp_path / "copy.toml").write_text(text + "# another comment, another path\n")
    copy = str(tmp_path / "copy.toml")
    assert wording(copy) == wording("task")
    assert wording("task", instruction="Think.") == wording("task") | {"instruction": "Think."}
    assert wording("harness", instruction="Think.") == wording("harness")  # reads no instruction
    written = {"evaluation": "e.csv", "context": "c", "answer": "a", "metric": "exact_match"}
    long = wording("harness", "mine", **written, max_new_tokens=64)
    assert long != wording("harness", "mine", **written)  # a chat says so
    (tmp_path / "copy.toml").write_text(text.replace("Passage:", "Text:"))
    assert wording(copy) == wording("task")
    assert wording(copy, "boolq") != wording("task", "boolq")


ALLOWED = "question, choice, choices[0], choices[1], listed, letter"
WRONG = {
    '[piqa]\nlayout = "{goal}"': f"piqa.layout: got {{goal}}; allowed: {ALLOWED}",
    '[piqa]\nlayout = "{qestion}"': f"piqa.layout: got {{qestion}}; allowed: {ALLOWED}",
    '[piqa]\nlayout = "{choices[2]}"': f"piqa.layout: got {{choices[2]}}; allowed: {ALLOWED}",
    '[piqa]\nlayout = "{question.__class__}"': f"piqa.layout: got {{question.__class__}}; allowed: {ALLOWED}",
    '[piqa]\nlayout = "{question!r}"': f"piqa.layout: got {{question!r}}; allowed: {ALLOWED}",
    '[piqa]\nlayout = "{question"': "piqa.layout: got '{question', expected '}' before end of string; allowed: names "
    "in braces",
    '[piqa]\nlayout = "Answer: "': "piqa.layout: ends with ' '; allowed: no space at its end (the one before the "
    "continuation is added)",
    '[winogrande]\nlayout = "{prefix}_"\ncontinuation = "{suffix}"': "winogrande: all choices are written alike; "
    "allowed: {choice} or {letter} in one of its strings",
    '[piqa]\nlayout = "{question}"\ncontinuation = "{letter}"': "piqa.continuation: got {letter}; allowed: only with "
    "{listed} in the layout",
    '[piqa]\nlayot = "{question}"': "piqa.layout: not set; piqa.layot: unknown key; did you mean piqa.layout?",
    '[pica]\nlayout = "{question}"': "pica: unknown key; did you mean piqa?",
    '[piqa]\nlayout = ""': "piqa.layout: got ''; allowed: at least 1 character",
    'shown = "{letter}) {chioce}"': "shown: got {chioce}; allowed: letter, choice",
    "piqa = 3": "piqa: got 3; allowed: a table",
}


@pytest.mark.parametrize(("tables", "message"), WRONG.items(), ids=WRONG.values())
def test_a_bad_set_is_named_with_its_file_and_field(tmp_path: Path, tables: str, message: str) -> None:
    path = written(tmp_path, tables)
    with pytest.raises(InputError, match=f"^{re.escape(f'prompts.template {path}: {message}')}$"):
        load_template(path)


def test_a_file_that_is_not_toml_or_has_no_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"configuration {tmp_path / 'mine.toml'}: not TOML (")):
        load_template(written(tmp_path, "[piqa"))
    with pytest.raises(InputError, match=r"name: not set; source: not set$"):
        load_template(written(tmp_path, "", head=""))


def test_a_wheel_holds_the_sets(tmp_path: Path) -> None:
    """Built in a copy, since building writes beside the sources."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "copy"
    (copy / "data").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "tailored_llama", "data/prompts"):
        subprocess.run(["cp", "-rP", ROOT / name, copy / name], check=True)
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,) = copy.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sets = [name for name in archive.namelist() if name.startswith("tailored_llama/data/template_sets/")]
        assert sorted(Path(name).stem for name in sets) == shipped()
        for name in sets:
            assert archive.read(name) == (ROOT / "data" / "prompts" / Path(name).name).read_bytes()
            tomllib.loads(archive.read(name).decode())
