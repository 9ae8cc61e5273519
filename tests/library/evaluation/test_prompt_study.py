"""Prompt studies: what is compared, what is chosen, and what the report says of the choice."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers import write_prompts
from tailored_llama.config import BenchmarkConfig, PromptStudyConfig, load_config
from tailored_llama.data import candidates
from tailored_llama.data.templates import shipped
from tailored_llama.errors import InputError
from tailored_llama.evaluation import MEAN, Difference, StudiedBenchmark, TemplateRow, study_differences, study_rows
from tailored_llama.evaluation.scores import PREDICTIONS_SCHEMA
from tailored_llama.evaluation.studies import choose
from tailored_llama.preflight import preflight_prompts
from tailored_llama.reports import prompt_study, stored_table
from tailored_llama.reports.prompt_study import write_study
from tailored_llama.store import read_rows, write_table


def study_file(folder: Path, text: str) -> Path:
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def load_study(path: Path) -> Any:
    return load_config(path, kind=PromptStudyConfig)


def test_all_shipped_sets_are_compared_where_none_is_named() -> None:
    config = PromptStudyConfig()
    assert list(candidates(config.templates, BenchmarkConfig(name="piqa"))) == shipped()
    written = BenchmarkConfig(name="mine", evaluation="e.csv", context="c", answer="a", metric="f1")
    assert list(candidates(config.templates, written)) == [name for name in shipped() if name != "lettered"]


def test_sets_of_one_s_own_go_by_their_names(tmp_path: Path) -> None:
    mine = tmp_path / "file.toml"
    mine.write_text('name = "mine"\nsource = "me"\n[piqa]\nlayout = "{question}"\n')
    config = load_study(study_file(tmp_path, f'benchmarks = ["piqa"]\ntemplates = ["task", "{mine}"]\n'))
    assert candidates(config.templates, config.benchmarks[0]) == {"task": "task", "mine": str(mine)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('templates = ["taks"]', "templates: got 'taks', no such template set; allowed: generic, harness"),
        ('templates = ["task", "task"]', "templates: got 'task', named 'task'; allowed: a name that no other set has"),
        ("examples = 0", "examples: got 0; allowed: greater than or equal to 1"),
        ("exampels = 9", "exampels: unknown key; did you mean examples?"),
        ("pruned = true\n[pruning]\nratios = [0.1, 0.2]", "pruning.ratios: got [0.1, 0.2]; allowed: one ratio with"),
    ],
)
def test_a_bad_study_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        preflight_prompts(load_study(study_file(tmp_path, text)))


def test_no_other_set_may_be_called_as_a_reference_is(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text('name = "generic"\nsource = "me"\n[arc_easy]\nlayout = "{question}"\n')
    with pytest.raises(InputError, match=r"named 'generic'; allowed: a name that no other set has$"):
        preflight_prompts(load_study(study_file(tmp_path, f'templates = ["{tmp_path / "g.toml"}"]')))


def scored(folder: Path, right: list[int], floor: float = 0.25) -> Path:
    """A scores folder of as many examples, each right (1) or wrong."""
    folder.mkdir(parents=True)
    n, accuracy = len(right), sum(right) / len(right)
    metrics = {"metric": "acc", "examples": n, "floor": floor, "acc": accuracy, "acc_stderr": 0.04}
    (folder / "metrics.json").write_text(json.dumps(metrics | {"benchmark": "any"}))
    columns: dict[str, Any] = {
        "example": range(n), "loglikelihoods": [[0.0, 0.0]] * n, "prediction": [1 - r for r in right],
        "prediction_norm": [0] * n, "answer": [0] * n,
    }  # fmt: skip
    write_table(folder / "predictions.parquet", columns, PREDICTIONS_SCHEMA)
    write_prompts(folder, f"<b>{folder.name}</b> asks")
    return folder


def hits(right: int) -> list[int]:
    return [1] * right + [0] * (100 - right)


@pytest.fixture
def studied(tmp_path: Path) -> list[StudiedBenchmark]:
    """PIQA, where task is chosen and better than generic; WinoGrande, where harness is chosen, at the floor."""

    def of(name: str, chosen: str, **right: int) -> StudiedBenchmark:
        folders = {t: scored(tmp_path / name / t, hits(n), 0.5) for t, n in right.items()}
        reported = {t: folders[t] for t in dict.fromkeys([chosen, "generic", "harness"])}
        return StudiedBenchmark(name, chosen, folders, reported, reported)

    return [
        of("piqa", "task", generic=50, harness=68, task=70),
        of("winogrande", "harness", generic=40, harness=52, task=51),
    ]


def test_the_best_on_the_slice_is_chosen_and_of_equals_the_first(tmp_path: Path) -> None:
    scores = {name: scored(tmp_path / name, hits(right)) for name, right in (("a", 40), ("b", 60), ("c", 60))}
    assert choose(scores) == "b"


def test_differences_are_paired_and_other_measures_stay_out_of_the_mean(studied: list[StudiedBenchmark]) -> None:
    config = PromptStudyConfig.model_validate({"benchmarks": ["piqa", "winogrande"]})
    rows = study_rows(config, studied)
    reported = [row for row in rows if row.benchmark == "winogrande" and row.split == "evaluation"]
    assert [(row.template, row.chosen, row.partial) for row in reported] == [
        ("harness", True, True), ("generic", False, False),
    ]  # fmt: skip
    found = {(d.benchmark, d.other): d for d in study_differences(config, studied, rows)}
    gain = found["piqa", "generic"]
    assert gain.difference == pytest.approx(0.2)
    assert 0.1 < gain.low < 0.2 < gain.high < 0.3
    assert not found["winogrande", "generic"].same_measure  # the choice against the rest of the sentence
    assert found["winogrande", "harness"].same_measure  # with itself
    assert found["winogrande", "harness"].low == found["winogrande", "harness"].high == 0
    assert (found[MEAN, "generic"].benchmarks, found[MEAN, "generic"].difference) == (1, gain.difference)
    assert found[MEAN, "harness"].benchmarks == 2
    assert found[MEAN, "harness"].difference == pytest.approx(0.01)


def test_the_report_says_what_was_gained_and_what_says_little(
    studied: list[StudiedBenchmark], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = PromptStudyConfig.model_validate({"benchmarks": ["piqa", "winogrande"]}), tmp_path / "out"
    out.mkdir()
    write_study(config, "tiny <b>", studied, out=out)
    rows = read_rows(out / "study.parquet", TemplateRow)
    differences = read_rows(out / "differences.parquet", Difference)
    said = prompt_study.summary(rows, differences)
    assert re.search(
        r"scores 20\.0 points more than generic \(95 % interval \+1\d\.0 to \+2\d\.0; mean of 1 of 2 ", said
    )
    assert "scores 1.0 points more than harness" in said
    assert "these examples cannot tell them apart" in said
    page = (out / "study.html").read_text()
    assert page.count("<svg") == 1
    assert "&lt;b&gt;task&lt;/b&gt; asks" in page  # the samples, as text
    assert "tiny &lt;b&gt;" in page
    assert "On winogrande no set is significantly above the floor" in page
    assert "On winogrande, harness scores the rest of the sentence after each choice (partial evaluation)." in page
    assert "On piqa" not in page
    assert "both sets&#39; answers" in page
    assert "held_out = 50" in page  # what the slice is drawn apart from
    assert not re.search("ratios|rank = |window", page)  # settings that nothing here reads
    assert page.count(">same set<") == 1
    assert page.count(">different measure<") == 1
    markdown = (out / "study.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "](differences.png)" in markdown
    assert (out / "differences.png").is_file()
    assert "| piqa (acc) | 100 | 0.500 | task | 0.700 ± 0.040 | 0.500 ± 0.040 | 0.680 ± 0.040 | +20.0 (" in markdown
    Console(width=80).print(stored_table(out))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(re.match(r"piqa task 0\.700±\.040 \+20\.0 \(\+1.*\) \+2\.0 \(", line) for line in lines)
