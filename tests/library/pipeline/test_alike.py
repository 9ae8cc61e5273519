"""The reference and the candidates of a proof are asked alike: by the same runtime, within the same limits."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from compositions import compose, folders
from helpers import save_worded_llama, words
from tailored_llama.config import SmallestConfig, build_config
from tailored_llama.errors import InputError
from tailored_llama.evaluation import check_alike, read_answer, read_metrics
from tailored_llama.evaluation.written import answers_schema
from tailored_llama.pipeline import FolderExecutor, read_certificate, verify_certificate
from tailored_llama.store import read_table

PENALTIES = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[40]], "min_new_tokens": 3}


def write_rows(file: Path, kind: str) -> str:
    """Rows whose answers are labels, texts of the model's own, or objects in JSON."""
    texts = words(300).split()[:300]
    answers = {
        "labels": ["ab"[i % 2] for i in range(300)],
        "written": ["aa" if i % 6 else "bb" for i in range(300)],
        "json": [json.dumps({"first": text[0], "even": i % 2 == 0}) for i, text in enumerate(texts)],
    }[kind]
    rows = [{"text": f"{i} {text}", "label": own} for i, (text, own) in enumerate(zip(texts, answers, strict=True))]
    file.write_text(json.dumps(rows))
    return str(file)


def search(folder: Path, model: Path, kind: str, **goal: Any) -> SmallestConfig:
    benchmark = {"name": "job", "data": write_rows(folder / "job.json", kind), "context": "text", "answer": "label"}
    benchmark |= {"labels": ["a", "b"]} if kind == "labels" else {"kind": kind, "max_new_tokens": 8}
    own = {
        "benchmarks": [benchmark],
        "model": {"source": str(model), "dtype": "float32"},
        "calibration": {"samples": 4, "tokens": 32},
        "tuning": {"epochs": 12, "shots": 40, "held_out": 16, "learning_rate": 0.02},
        "pruning": {"ratios": [0.1386]},
        "goal": {"lose_at_most": 40, "choosing_rows": 30, "types": ["q8_0"], "even_if_unprovable": True} | goal,
        "store": {"root": str(folder / "store"), "reports": None, "export": str(folder / "small")},
    }
    return build_config(SmallestConfig, own)


def texts_in(root: Path) -> list[list[str]]:
    """What models wrote to the rows to prove on, and to choose with, in an order that does not depend on the store."""
    found = [folder / "answers.parquet" for kind in ("scores", "served-scores") for folder in folders(str(root), kind)]
    return sorted(read_table(file, answers_schema("exact_match"))["text"].to_pylist() for file in found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_worded_llama(tmp_path_factory.mktemp("models") / "dense")


@pytest.mark.parametrize("kind", ["labels", "written", "json"])
def test_llama_cpp_asks_the_reference_as_it_asks_the_candidates(tmp_path: Path, model: Path, kind: str) -> None:
    config = search(tmp_path, model, kind)
    answer = read_answer(compose("smallest", config))
    asked = [read_metrics(folder)["asking"] for folder in folders(config.store.root, "served-scores")]
    assert len(asked) == 1 + len(answer.tests)  # once
    assert all(own == asked[0] for own in asked)
    assert (asked[0]["runtime"], asked[0]["answers"]) == ("llama.cpp", "written")
    allowed = {"labels": ["a", "b"], "written": None, "json": ["first", "even"]}[kind]
    assert allowed == (asked[0]["allowed"]["required"] if kind == "json" else asked[0]["allowed"])


@pytest.mark.parametrize("runtime", ["llama.cpp", "transformers"])
def test_the_penalties_of_a_checkpoint_change_no_verdict(
    tmp_path: Path, model: Path, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, texts = [], []
    for name, stated in {"free": {}, "punished": PENALTIES}.items():
        (folder := tmp_path / name).mkdir()
        monkeypatch.setenv("XDG_STATE_HOME", str(folder))  # two users: both open the rows for the first time
        checkpoint = shutil.copytree(model, folder / "dense")
        (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **stated}))
        config = search(folder, checkpoint, "written", runtime=runtime)
        answers.append(read_answer(compose("smallest", config)))
        texts.append(texts_in(config.store.root))
        for shipped in (folder / "small" / "job").glob("generation_config.json"):
            assert PENALTIES.keys().isdisjoint(json.loads(shipped.read_text()))
    assert answers[0] == answers[1]
    assert answers[0].tests[0]["job"].dense > 0.5
    assert texts[0] == texts[1] != []


def test_a_reference_that_is_scored_again_is_asked_as_the_certified_file(tmp_path: Path, model: Path) -> None:
    config = search(tmp_path, model, "json")
    assert read_answer(compose("smallest", config)).proven is not None
    certificate = read_certificate(tmp_path / "small" / "job", [str(tmp_path / "job.json")])
    (scratch := tmp_path / "scratch").mkdir()
    executor = FolderExecutor(scratch, "", certificate.config.execution)
    test, stated = verify_certificate(executor, certificate, str(model))["job"], certificate.content.benchmarks["job"]
    assert (test.dense, test.small, test.p) == (stated.dense, stated.small, stated.p)


def test_scores_of_models_that_were_asked_otherwise_are_not_compared(tmp_path: Path) -> None:
    asking: dict[str, Any] = {"runtime": "llama.cpp", "answers": "written", "allowed": ["a", "b"]}
    for name, changes in {"first": {}, "second": {"allowed": None}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"asking": asking | changes}))
    check_alike(tmp_path / "first", tmp_path / "first")
    told = re.escape("asking.allowed: got None; allowed: ['a', 'b'], as the first model was asked")
    with pytest.raises(InputError, match=told):
        check_alike(tmp_path / "first", tmp_path / "second")
