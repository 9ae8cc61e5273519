"""Every composition as a flow: it runs to its end, and finds, and is found by, the same composition without Prefect."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compositions import built, compose, kinds, status_of
from flows.__main__ import app
from flows.compositions import FLOWS, tailor
from helpers import as_toml, write_own_benchmark
from services import ROOT
from tailored_llama.config import load_config, validate_config
from tailored_llama.errors import InputError
from tailored_llama.pipeline import COMPOSITIONS
from tasks.executor import open_store

States = dict[str, list[str]]
STUDIES = {  # what a configuration has beside that of a run: before its sections, and after them
    "tailor": ("", ""),
    "sweep": ("tailored = true\n", '[[grid]]\n"pruning.criterion" = ["random"]\n'),
    "smallest": ("", '[goal]\nruntime = "transformers"\nlose_at_most = 90\neven_if_unprovable = true\n'),
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_runs_to_its_end_and_all_of_it_is_found_without_prefect(
    own_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], states: States, name: str
) -> None:
    path, root = tmp_path / "run.toml", own_run["store"]["root"]
    if name == "smallest":
        own_run["store"]["export"] = str(tmp_path / "models")
        write_own_benchmark(tmp_path / "data", train=80)  # enough to choose with
    path.write_text(as_toml(own_run).join(STUDIES[name]))
    assert status_of(app, [name, str(path)]) == 0
    (page,) = (Path(line[8:]) for line in capsys.readouterr().out.splitlines() if line.startswith("report: "))
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert states["load colours"][0] == "Completed"
    before = built(root)
    assert len(before) == sum(seen.count("Completed") for seen in states.values())
    report = compose(name, load_config(path, kind=COMPOSITIONS[name].kind))
    assert built(root) == before
    assert kinds(root).count(report.parent.name) == 1


def test_a_flow_finds_all_that_was_computed_without_prefect(own_run: dict[str, Any], states: States) -> None:
    config, root = validate_config(own_run), own_run["store"]["root"]
    report = compose("tailor", config)
    before = built(root)
    found = tailor(config)
    assert (found.stage, found.key) == (report.parent.name, report.name)
    assert built(root) == before
    assert {"load colours", "tune colours @ 0.20", "report"} <= states.keys()
    assert {name for seen in states.values() for name in seen} == {"Cached"}


def test_what_was_pulled_from_a_url_is_not_called_computed(
    own_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_run["store"]["root"] = "memory://pulled"
    (tmp_path / "run.toml").write_text(as_toml(own_run))
    for machine in ("one", "other"):
        monkeypatch.setenv("HOME", str(tmp_path / machine))  # where working copies are
        open_store.cache_clear()
        assert status_of(app, ["tailor", str(tmp_path / "run.toml"), "--set", f"scoring.limit={len(machine)}"]) == 0
    said = capsys.readouterr().out.splitlines()
    _, told = (line for line in said if line.startswith("stages: "))
    assert told.startswith("stages: 5 computed in this run, ")  # prompts, three scores, the report
    assert " found in the store, " in told


def test_one_stage_alone_runs_with_what_it_reads(own_run: dict[str, Any], states: States) -> None:
    config = validate_config(own_run)
    assert tailor(config, only="prune @ 0.20").stage == "pruned"
    read = {"build graph", "check ratio 0.2", f"load calibration {config.calibration.source}", "importance taylor_gate"}
    assert states.keys() == {f"load {config.model.source}", *read, "prune @ 0.20"}


def test_a_stage_that_is_none_is_refused_before_heavy_work(own_run: dict[str, Any], states: States) -> None:
    message = r"only: got 'tune numbers @ 0.20'; allowed: load .*; tune colours @ 0.20; score colours tailored @ 0.20"
    with pytest.raises(InputError, match=message):
        tailor(validate_config(own_run), only="tune numbers @ 0.20")
    assert not any(name.startswith(("importance", "score", "tune", "perplexity")) for name in states)


def test_bad_input_ends_with_status_2_and_one_clear_line(
    own_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path := tmp_path / "run.toml").write_text(as_toml(own_run))
    assert status_of(app, ["tailor", str(path), "--set", "pruning.ratios=[0.95]"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: pruning.ratios: got 0.95; allowed: at most 0.")


def test_a_wrong_value_is_refused_before_prefect_and_torch_are_loaded() -> None:
    code = "import atexit, sys; from flows.__main__ import app; atexit.register(lambda: print(*sys.modules)); app()"
    command = [sys.executable, "-c", code, "tailor", "data/quickstart.toml", "--set", "pruning.ratios=2"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.stderr == "error: pruning.ratios: got 2; allowed: a list\n"
    loaded = run.stdout.split()
    assert run.returncode == 2
    assert "tailored_llama.config" in loaded
    assert not {"prefect", "torch", "transformers"} & set(loaded)
