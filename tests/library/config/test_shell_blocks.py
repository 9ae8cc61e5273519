"""Every shell block of the pages can be run: commands, options, files and fields exist, or it says at which commit."""

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.exceptions import TyperException
from typer.main import get_command

from flows.__main__ import app as flows_app
from tailored_llama.cli.main import app
from tailored_llama.config import RunConfig, SmallestConfig, composition_of, read_config_data, validate_as
from tailored_llama.errors import InputError
from tailored_llama.pipeline import COMPOSITIONS

ROOT = Path(__file__).parents[3]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("d*/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^```(?:sh|bash|shell)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)  # console: Typer wrote it
PUNCTUATION = ";&|()<>\n"
FILE = re.compile(r"[\w./-]+\.(csv|jsonl|json|parquet|toml|gguf|txt|gbnf|yaml|sh|py)")
COMMENT = re.compile(r"(?:^|[ \t])#.*", flags=re.MULTILINE)
PLACEHOLDER = re.compile(r"[A-Z_]+(/.*)?|my[.-].*")  # FOLDER is any folder, and my.csv the reader's
FOLDERS = {"data", "deployments", "docs", "flows", "tailored_llama", "tasks", "tests"}  # runs leave others beside them
WRITTEN = {"out", "export", "write"}  # arguments that name what a command makes
OTHERS = re.compile(
    r"\.|cat|cd|curl|docker|git|kubectl|lm-eval|llama-server|mv|pip|prefect|python|sed|sleep|sudo|vllm|/usr/bin/time"
)


def commands(block: str) -> Iterator[list[str]]:
    """The words of every command of a block, without what stands around it; of a loop, those of its first round."""
    text = COMMENT.sub("", block.replace("\\\n", " "))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=PUNCTUATION)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    variables: dict[str, str] = {}
    between = ""
    for separates, group in groupby(lexer, key=lambda word: bool(word) and set(word) <= set(PUNCTUATION)):
        words = list(group)
        if separates:
            between = "".join(words)
            continue
        if ">" in between:  # what it writes
            words.insert(0, ">")
        if words[:1] == ["for"]:
            variables[words[1]] = words[3]
            continue
        while words and (words[0] in ("do", "done", "time", "export") or re.match(r"\w+=", words[0])):
            name, given, value = words.pop(0).partition("=")
            if given:
                variables[name] = value
        if found := [part for word in words for part in _expanded(word, variables)]:
            yield found


def _expanded(word: str, variables: dict[str, str]) -> list[str]:
    if (whole := re.fullmatch(r"\$(\w+)", word)) and whole[1] in variables:
        return shlex.split(variables[whole[1]])
    return [re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), word)]


class Blocks:
    """The shell blocks of one page, in order: an earlier one makes what a later one reads."""

    def __init__(self, text: str) -> None:
        self.blocks = [(text[: found.start()].count("\n") + 1, found[1]) for found in BLOCK.finditer(text)]
        self.prose = BLOCK.sub(lambda found: "\n".join(COMMENT.findall(found[1])), text)
        self.made = set[str]()

    def problems(self) -> Iterator[str]:
        for line, block in self.blocks:
            is_pinned = False  # what follows is of a commit
            for words in commands(block):
                if words[:2] == ["git", "checkout"]:
                    is_pinned = True
                    if not is_in_history(words[2]):
                        yield f"line {line}: git checkout {words[2]}: not in the history"
                elif not is_pinned:
                    yield from (f"line {line}: {shlex.join(words)}: {problem}" for problem in self.check(words))

    def check(self, words: list[str]) -> Iterator[str]:
        """What is wrong with a command."""
        program, *rest = words
        if program == ">":
            self.made.add(rest[0])
            return
        yield from (f"{word}: no such file" for word in words if "/" in word and self.has_left(word))
        if program == "tailored-llama":
            yield from self.check_options(_command(app), rest)
        elif program == "python" and rest[0] == "-m":
            if rest[1] == "flows":
                yield from self.check_options(_command(flows_app), rest[2:])
            elif not importlib.util.find_spec(rest[1]):
                yield f"{rest[1]}: no such module"
        elif program == "python" and (ROOT / rest[0]).is_file():
            if parser := script(rest[0]):
                yield from self.check_options(parser, rest[1:], writes={"folder"})
            else:
                text = (ROOT / rest[0]).read_text()
                yield from (f"{word}: no such option" for word in rest if word[:2] == "--" and f'"{word}"' not in text)
        elif program == "make":
            yield from (f"{word}: no such target" for word in rest if word not in targets())
        elif not OTHERS.fullmatch(program) and not (ROOT / program).is_file():
            yield "unknown command"

    def has_left(self, word: str) -> bool:
        """Whether a word is a path into a folder of the repository, where nothing has this name."""
        path = word.split("=")[-1]
        top = path.removeprefix("./").split("/")[0]
        return bool(re.fullmatch(r"[\w.][\w./-]*", path)) and top in FOLDERS and not (ROOT / path).exists()

    def check_options(self, command: Any, words: list[str], writes: AbstractSet[str] = frozenset()) -> Iterator[str]:
        """Parse the words as the program does, and check the files and fields that they name."""
        try:
            while hasattr(command, "commands") and not words[0].startswith("-"):
                command, words = command.commands[words[0]], words[1:]
            writes = WRITTEN | writes | ({"folder"} if command.name == "example" else set())
            for parameter in command.params:
                parameter.callback = None  # it would look for the folder
            values = command.make_context(command.name, list(words)).params
        except typer.Exit:  # --help
            return
        except KeyError:
            yield f"{words[0]}: no such command"
            return
        except TyperException as error:
            yield str(error)
            return
        overrides = next((values[own.name] for own in command.params if "--set" in own.opts), None)
        if overrides is not None or "config" in values:
            yield from self.check_fields(values, list(overrides or []), command.name)
        for own in command.params:
            value = values[own.name]
            for each in value if isinstance(value, list | tuple) else [value]:
                if own.name in writes and each:
                    self.made.add(str(each))
                elif each and (isinstance(each, Path) or FILE.fullmatch(str(each))) and not self.has(each):
                    yield f"{each}: no such file, nothing on the page has made it, and its text does not name it"

    def has(self, path: Any) -> bool:
        """Whether a path exists, was made by an earlier command, is a placeholder, or stands in the page's text."""
        names = {str(path), *map(str, Path(path).parents)} - {"."}
        if PLACEHOLDER.fullmatch(str(path)) or (ROOT / path).exists() or names & self.made:
            return True
        return bool(re.search(rf"(?<![\w/]){re.escape(str(path))}(?!\w)", self.prose))

    def check_fields(self, values: dict[str, Any], overrides: list[str], name: str) -> Iterator[str]:
        """Validate a configuration with its overrides, and with each `--vary`."""
        config = values.get("config")
        file = config if config and (ROOT / config).is_file() else None
        for vary in values.get("vary") or [""]:
            given = [*overrides, *vary.split()]
            self.made |= {own.partition("=")[2] for own in given if own.startswith("store.root=")}
            try:
                if name in COMPOSITIONS:
                    kind = COMPOSITIONS[name].kind
                elif file:
                    kind = COMPOSITIONS[composition_of(ROOT / file, given)].kind
                else:
                    kind = SmallestConfig if name == "run" else RunConfig
                data = read_config_data(file and ROOT / file, given)
                rows = {"benchmarks": values["rows"]} if name == "smallest" and "rows" in values else {}
                validate_as(kind, rows | data)
            except InputError as error:
                yield str(error)


@cache
def _command(typed: typer.Typer) -> Any:
    return get_command(typed)


@cache
def script(path: str) -> Any:
    """The command of a script; None: it has none of Typer."""
    if "import typer" not in (ROOT / path).read_text():
        return None
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if hasattr(module, "app"):
        return get_command(module.app)
    own = typer.Typer(add_completion=False)
    own.command()(module.main)
    return get_command(own)


@cache
def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    return {word for line in re.findall(r"^([^\s:#=][^:=\n]*):", makefile, flags=re.MULTILINE) for word in line.split()}


@cache
def is_in_history(commit: str) -> bool:
    """Whether a commit is an ancestor; true where the history is cut short, or there is none."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        return True
    return git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shell_block_can_be_run(page: Path) -> None:
    problems = list(dict.fromkeys(Blocks(page.read_text()).problems()))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("tailored-llama prune MODEL out --ration 0.2", "--ration"),
        ("tailored-llama profile MODEL", "profile: no such command"),
        ("tailored-llama run data/quickstart.toml --set tuning.ranking=1", "tuning.ranking: unknown key"),
        ("python -m flows tailor data/gone.toml", "data/gone.toml: no such file"),
        ("python tests/performance/criterion.py FOLDER data/sweep.toml --vary pruning.shape=any", "pruning.shape"),
        ("tailored-llama answer finished my.csv --out answered.csv", "finished: no such file"),
        ("python tests/performance/gone.py", "tests/performance/gone.py: no such file"),
        ("python tests/performance/dispatch.py --gone", "--gone: no such option"),
        ("make gone", "gone: no such target"),
        ("frobnicate --now", "unknown command"),
    ],
)
def test_what_has_left_is_found(command: str, problem: str) -> None:
    page = "```sh\n{}\n```\n".format
    found = list(Blocks(page(command)).problems())
    assert any(problem in one for one in found), found
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    pinned = f"git checkout {head.stdout.strip() or '0000000'}\n{command}"
    assert not list(Blocks(page(pinned)).problems())


def test_a_commit_outside_the_history_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": (0, "false"), "merge-base": (1, "")}
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, *answers[words[1]]))
    (problem,) = Blocks("```sh\ngit checkout 0123456\nfrobnicate\n```\n").problems()
    assert problem == "line 1: git checkout 0123456: not in the history"
