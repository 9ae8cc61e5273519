"""A prompt study on a tiny model against a real (temporary) Prefect server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from flows.prompts import prompts
from tasks._stage import open_store

from flows.__main__ import main
from helpers import as_toml
from tailored_llama.config import PromptStudyConfig
from tailored_llama.data import read_prompts
from tailored_llama.evaluation import read_study


def built(config: PromptStudyConfig) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in Path(config.store.root).glob("*/*/manifest.json")}


def test_the_choice_is_the_slice_s_and_a_changed_wording_is_scored_alone(
    own_run: dict[str, Any], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('name = "mine"\nsource = "me"\n[own]\nlayout = "Hm. {context}"\n')
    study = {"templates": ["task", "lettered", str(mine)], "examples": 12, "pruned": True}
    config = PromptStudyConfig.model_validate(own_run | study)
    rows, differences = read_study(open_store(config.store).open(prompts(config)))
    tried = {row.template: row for row in rows if row.split == "selection"}
    assert list(tried) == ["task", "lettered", "mine"]
    best = max(tried.values(), key=lambda row: row.accuracy)
    assert [row.template for row in tried.values() if row.chosen] == [best.template]
    reported = [row for row in rows if row.split == "evaluation"]
    assert [row.template for row in reported] == [best.template, "generic", "harness"]
    assert {row.examples for row in rows} == {12}
    assert [(d.template, d.other) for d in differences] == [(best.template, "generic"), (best.template, "harness")]

    folders = [path.parent for path in built(config) if path.parent.parent.name == "prompts"]
    slices = {tuple(prompt.example for prompt in read_prompts(folder, "selection")) for folder in folders} - {()}
    assert len(slices) == 1  # the same examples for every set

    before = built(config)
    mine.write_text(mine.read_text().replace("Hm.", "Well,") + "# a comment\n")
    prompts(config)
    new = [path.parent.parent.name for path in built(config).keys() - before.keys()]
    assert set(new) == {"prompts", "scores", "prompt-study"}
    assert new.count("prompts") <= 2  # the slice, and the evaluation split where it is chosen

    mine.rename(tmp_path / "moved.toml")
    before = built(config)
    moved = config.model_copy(update={"templates": ("task", "lettered", str(tmp_path / "moved.toml"))})
    prompts(moved)
    assert {path.parent.parent.name for path in built(config).keys() - before.keys()} == {"prompt-study"}


def test_the_command_prints_a_table_and_the_path_of_the_report(
    own_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.toml"
    study = {"templates": ["task", "generic"], "examples": 6}
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in study.items()) + as_toml(own_run))
    assert main(["prompts", str(path)]) == 0
    output = capsys.readouterr().out
    assert re.search(r"colours +(task|generic) +0\.\d{3}±\.\d{3}", output)
    assert Path(output.strip().splitlines()[-1].removeprefix("report: ")).read_text().startswith("<!DOCTYPE html>")
    assert main(["prompts", str(path), "--set", "examples=13"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: examples: got 13; allowed: at most 12 (colours has so many train examples")
