"""One stage alone, by its name: it runs with what it reads, and a name that is none is refused before heavy work."""

from pathlib import Path
from typing import Any

import pytest

from compositions import built, compose, fail, folders, kinds, run_command
from helpers import as_toml
from tailored_llama import training
from tailored_llama.config import validate_config
from tailored_llama.pipeline import STAGES

HEAVY = {stage.name for stage in STAGES.values() if stage.on_device}


@pytest.fixture
def file(own_run: dict[str, Any], tmp_path: Path) -> Path:
    """The configuration of a run in which every stage has its part, as a file."""
    own_run["tuning"]["dense"] = True
    path = tmp_path / "run.toml"
    path.write_text(as_toml(own_run))
    return path


def test_a_stage_runs_with_what_it_reads_and_the_pipeline_finds_what_it_made(
    own_run: dict[str, Any], file: Path
) -> None:
    root = own_run["store"]["root"]

    def new(name: str) -> list[str]:
        before = built(root)
        status, output, errors = run_command(file, "--only", name)
        assert status == 0, errors
        kind, _, folder = output.strip().rpartition(": ")
        assert Path(folder) in built(root)
        assert Path(folder).parent.name == kind
        return kinds(root, before)

    assert new("score colours dense") == ["dense", "examples", "prompts", "scores"]
    assert new("importance taylor_gate") == ["calibration", "groups", "importance"]
    assert new("perplexity dense") == ["perplexity"]
    assert new("prune @ 0.20") == ["pruned", "reach"]
    assert new("perplexity pruned @ 0.20") == ["perplexity"]
    assert new("tune colours @ 0.20") == ["adapter", "answers", "answers", "prompts"]
    assert new("tune colours @ 0.20") == []
    before = built(root)
    compose("tailor", validate_config(own_run))
    assert kinds(root, before) == ["adapter", "report"] + ["scores"] * 3


@pytest.mark.parametrize(
    ("study", "named"),
    [
        ("tailor", ("importance taylor_gate; ", "tune colours @ 0.20; ", "score colours tailored @ 0.20")),
        ("sweep", ("score colours dense; ", "prune @ 0.20; ", "score colours random @ 0.2")),
    ],
)
def test_an_unknown_name_is_refused_with_all_that_there_are_before_heavy_work(
    two: dict[str, Any], file: Path, study: str, named: tuple[str, ...]
) -> None:
    if study != "tailor":
        two["tuning"]["dense"] = False
        file.write_text(as_toml(two) + '[[grid]]\n"pruning.criterion" = ["random"]\n')
    status, _, errors = run_command(file, "--only", "tune numbers @ 0.20")
    assert status == 2
    assert errors.startswith("error: only: got 'tune numbers @ 0.20'; allowed: load ")
    assert all(name in errors for name in named)
    assert not HEAVY & set(kinds(two["store"]["root"]))


def test_a_search_knows_only_what_does_not_depend_on_values(own_run: dict[str, Any], file: Path) -> None:
    file.write_text(as_toml(own_run) + '[goal]\nlose_at_most = 50\nruntime = "transformers"\n')
    status, _, errors = run_command(file, "--only", "tune colours @ 0.20")
    start, told = "error: only: got 'tune colours @ 0.20'; allowed: load colours; ", errors.splitlines()[-1]
    assert (status, told.startswith(start)) == (2, True)
    assert told.endswith("; tune colours @ 0.00; and what depends on the result of load colours, once that is there")
    assert not HEAVY & set(kinds(own_run["store"]["root"]))


@pytest.mark.parametrize("name", ["tune colours @ 0.20", "tune colours @ 0.00"])
def test_a_stage_that_fails_says_why(file: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also one without which a whole run goes on, such as the dense model's tuning."""
    fail(monkeypatch, (training, "tune"), RuntimeError("a shape is wrong"))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        run_command(file, "--only", name)


def test_ratios_that_are_alike_in_two_digits_have_names_of_their_own(own_run: dict[str, Any], file: Path) -> None:
    own_run["pruning"]["ratios"] = [0.201, 0.204]
    file.write_text(as_toml(own_run))
    root = own_run["store"]["root"]
    for ratio in (0.201, 0.204):
        assert run_command(file, "--only", f"prune @ {ratio}")[0] == 0
    assert len(folders(root, "pruned")) == 2
