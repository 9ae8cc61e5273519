"""Whole runs whose benchmark is a task of lm-evaluation-harness, on local data."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from compositions import built, compose
from helpers import write_jsonl
from tailored_llama.config import validate_config
from tailored_llama.evaluation import read_recovery


@pytest.fixture
def tasks(own_run: dict[str, Any], tmp_path: Path) -> Path:
    """Task files: choices with a train split, written answers without one."""
    own, folder = own_run["benchmarks"][0], tmp_path / "tasks"
    folder.mkdir()
    words = write_jsonl(tmp_path / "words.jsonl", [{"text": f"{i}:", "answer": f"{i}"} for i in range(6)])
    settings = {
        "colours": {
            "dataset_kwargs": {"data_files": {"train": own["train"], "test": own["evaluation"]}},
            "training_split": "train",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "right",
        },
        "words": {
            "dataset_kwargs": {"data_files": {"test": words}},
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        },
    }
    for name, task in settings.items():
        common = {"task": name, "dataset_path": "json", "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


def test_a_task_is_tuned_scored_exported_and_found_again(own_run: dict[str, Any], tasks: Path, tmp_path: Path) -> None:
    own_run["benchmarks"] = [{"name": "lm_eval:colours", "source": str(tasks)}]
    own_run["store"]["export"] = str(tmp_path / "models")
    config = validate_config(own_run)
    report = compose("tailor", config)
    rows, _ = read_recovery(report)
    row = next(row for row in rows if row.model == "tailored")
    assert (row.benchmark, row.metric, row.examples) == ("lm_eval:colours", "acc_norm", 12)
    card = (tmp_path / "models" / "lm_eval-colours-0.2" / "README.md").read_text()
    assert "the wording of lm-evaluation-harness" in card
    assert str(tmp_path) not in card
    before = built(config.store.root)
    assert compose("tailor", config) == report
    assert built(config.store.root) == before


def test_a_task_without_a_train_split_is_scored_untuned(own_run: dict[str, Any], tasks: Path) -> None:
    own_run["benchmarks"] = [{"name": "lm_eval:words", "source": str(tasks)}]
    own_run["tuning"] = {"examples": "none"}
    rows, _ = read_recovery(compose("tailor", validate_config(own_run)))
    assert {row.metric for row in rows if row.benchmark == "lm_eval:words"} == {"exact_match"}
