"""A prompt study on a tiny model: what is chosen, and what a changed wording costs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from compositions import built, compose, fail, folders, kinds, run_command
from helpers import as_toml
from tailored_llama import evaluation
from tailored_llama.config import PromptStudyConfig, build_config
from tailored_llama.data import read_prompts
from tailored_llama.evaluation import Difference, TemplateRow
from tailored_llama.pipeline import IncompleteRun
from tailored_llama.store import read_rows


def test_the_choice_is_the_slice_s_and_a_changed_wording_is_scored_alone(
    own_run: dict[str, Any], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('name = "mine"\nsource = "me"\n[own]\nlayout = "Hm. {context}"\n')
    study = {"templates": ["task", "lettered", str(mine)], "examples": 12, "pruned": True}
    config = build_config(PromptStudyConfig, own_run | study)
    report = compose("prompts", config)
    rows = read_rows(report / "study.parquet", TemplateRow)
    differences = read_rows(report / "differences.parquet", Difference)
    tried = {row.template: row for row in rows if row.split == "selection"}
    assert list(tried) == ["task", "lettered", "mine"]
    best = max(tried.values(), key=lambda row: row.accuracy)
    assert [row.template for row in tried.values() if row.chosen] == [best.template]
    reported = [row for row in rows if row.split == "evaluation"]
    assert [row.template for row in reported] == [best.template, "generic", "harness"]
    assert {row.examples for row in rows} == {12}
    assert [(d.template, d.other) for d in differences] == [(best.template, "generic"), (best.template, "harness")]

    root = config.store.root
    rendered = [read_prompts(folder, "selection") for folder in folders(root, "prompts")]
    slices = {tuple(prompt.example for prompt in prompts) for prompts in rendered} - {()}
    assert len(slices) == 1  # the same examples for every set

    before = built(root)
    mine.write_text(mine.read_text().replace("Hm.", "Well,") + "# a comment\n")
    compose("prompts", config)
    new = kinds(root, before)
    assert set(new) == {"prompts", "scores", "prompt-study"}
    assert new.count("prompts") <= 2  # the slice, and the evaluation split where it is chosen

    mine.rename(tmp_path / "moved.toml")
    before = built(root)
    moved = config.model_copy(update={"templates": ("task", "lettered", str(tmp_path / "moved.toml"))})
    compose("prompts", moved)
    assert kinds(root, before) == ["prompt-study"]


def test_the_command_prints_a_table_and_the_path_of_the_report(own_run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    study = {"templates": ["task", "generic"], "examples": 6}
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in study.items()) + as_toml(own_run))
    status, output, _ = run_command(path, "--study", "prompts")
    assert status == 0
    assert re.search(r"colours +(task|generic) +0\.\d{3}±\.\d{3}", output)
    assert Path(output.strip().splitlines()[-1].removeprefix("report: ")).read_text().startswith("<!DOCTYPE html>")
    status, _, errors = run_command(path, "--study", "prompts", "--set", "examples=13")
    assert status == 2
    assert (
        errors.strip()
        .splitlines()[-1]
        .startswith("error: examples: got 13; allowed: at most 12 (colours has so many examples")
    )


def test_a_failure_behind_the_report_is_told(own_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = PromptStudyConfig.model_validate(own_run | {"templates": ["task"], "examples": 4})
    error = RuntimeError("no memory")
    fail(monkeypatch, (evaluation, "score_benchmark"), error, lambda call: call["settings"].split == "evaluation")
    with pytest.raises(IncompleteRun, match="score colours task: no memory"):
        compose("prompts", config)
