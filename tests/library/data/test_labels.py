"""The file in which labels are asked for: what people and spreadsheets do to it, and what is refused."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import write_jsonl
from tailored_llama.config import BenchmarkConfig, SmallestConfig, build_config
from tailored_llama.data import NONE, UNLABELLED, Asked, labels_in, merged, read_asked, write_asked
from tailored_llama.data.benchmarks import Example, load_examples
from tailored_llama.data.splits import Split, divide
from tailored_llama.errors import InputError
from tailored_llama.files import read_file

ROWS = {i: Asked("job", 1 + i // 2, text, ("bad", "good")) for i, text in enumerate(["A, b", "two\nlines", "c"])}


@pytest.fixture(params=[".csv", ".jsonl"])
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A file that asks for the labels of all rows."""
    file = tmp_path / f"to-label{request.param}"
    write_asked(file, [*ROWS.values()])
    return file


def answered(file: Path, *answers: str) -> dict[int, str]:
    """The labels of the rows, once they have these answers."""
    rows = read_asked(file)
    write_asked(file, [replace(row, answer=answer) for row, answer in zip(rows, answers, strict=True)])
    return labels_in(file, {"job": ROWS})["job"]


def test_a_file_says_what_may_be_answered_and_nothing_of_any_model(file: Path) -> None:
    (first, *_) = read_file(file)
    assert list(first) == ["benchmark", "part", "row", "answers", "answer", "note"]
    assert first["row"] == "A, b"
    assert first["answers"] == ('["bad", "good"]' if file.suffix == ".csv" else ["bad", "good"])
    assert first["answer"] == ""


def test_answers_are_read_by_their_rows_and_some_may_be_missing(file: Path) -> None:
    assert answered(file, "", "Good ", NONE) == {1: "good", 2: NONE}


def test_what_a_spreadsheet_changes_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "to-label.csv"
    write_asked(file, [*ROWS.values()])
    rows = read_file(file)
    rows[1] |= {"row": "two lines ", "answer": "bad", "note": "sure", "mine": "x"}
    rows.reverse()
    with file.open("w", newline="", encoding="utf-8-sig") as out:
        table = csv.DictWriter(out, [*rows[1], "mine"] if "mine" not in rows[1] else [*rows[1]], restval="")
        table.writeheader()
        table.writerows(rows)
    assert labels_in(file, {"job": ROWS})["job"] == {1: "bad"}


def test_a_spreadsheet_may_use_semicolons_and_leave_empty_rows(tmp_path: Path) -> None:
    file = tmp_path / "to-label.csv"
    file.write_text(
        'benchmark;part;row;answers;answer\njob;1;A, b;"[""bad"", ""good""]";bad\n;;;;\n', encoding="utf-8-sig"
    )
    assert labels_in(file, {"job": ROWS})["job"] == {0: "bad"}
    file.write_text("benchmark,part,row,answers,answer,note\n")
    assert labels_in(file, {"job": ROWS})["job"] == {}


def test_an_answer_that_differs_in_capitals_alone_is_itself(file: Path) -> None:
    row = replace(ROWS[0], answers=("US", "us", "a | b"))
    for answer in row.answers:
        write_asked(file, [replace(row, answer=answer)])
        assert labels_in(file, {"job": {0: row}})["job"] == {0: answer}


def test_rows_that_ask_the_same_share_a_label(file: Path) -> None:
    write_asked(file, [replace(ROWS[0], answer="bad")])
    assert labels_in(file, {"job": {3: ROWS[0], 5: ROWS[0]}})["job"] == {3: "bad", 5: "bad"}


def test_a_written_answer_may_be_any_text(tmp_path: Path) -> None:
    file = tmp_path / "to-label.csv"
    row = replace(ROWS[0], answers=(), answer="any, text")
    write_asked(file, [row])
    assert labels_in(file, {"job": {0: row}})["job"] == {0: "any, text"}


def test_without_a_file_there_are_no_labels(tmp_path: Path) -> None:
    assert labels_in(tmp_path / "none.csv", {"job": ROWS}) == {"job": {}}


def test_answers_are_kept_when_other_rows_are_asked_for(file: Path) -> None:
    answered(file, "good", "", "bad")
    rows = merged([replace(ROWS[0], row="new"), ROWS[2]], read_asked(file))
    assert [(row.row, row.answer) for row in rows] == [("A, b", "good"), ("new", ""), ("c", "bad")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "fine"}, "row 0: answer: got 'fine'; allowed: 'bad', 'good', 'none of these'"),
        (
            {"row": "A, c", "answer": "bad"},
            "row 0: got 'A, c' of job, which was not asked for, or was changed; allowed: ",
        ),
        ({"benchmark": "other"}, "row 0: got 'A, b' of other, which was not asked for, or was changed; allowed: "),
        (
            {"row": "c", "answer": "bad"},
            "row 2: answer: got 'good' for a row that has 'bad' above; allowed: one answer",
        ),
    ],
)
def test_what_does_not_belong_there_is_refused_in_one_line(file: Path, changes: dict[str, Any], message: str) -> None:
    first, second, third = read_asked(file)
    write_asked(file, [replace(first, **changes), second, replace(third, answer="good")])
    with pytest.raises(InputError) as error:
        labels_in(file, {"job": ROWS})
    assert str(error.value).startswith(f"{file}: {message}")
    assert "\n" not in str(error.value)


def test_a_file_without_a_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "to-label.csv").write_text("row,answer\na,b\n")
    with pytest.raises(InputError, match="row 0: got no column 'benchmark'; allowed: the columns benchmark, part"):
        read_asked(tmp_path / "to-label.csv")


def labelled(count: int) -> list[dict[str, Any]]:
    return [{"text": f"number {i}", "label": "ab"[i % 2]} for i in range(count)]


def job(
    folder: Path, rows: list[dict[str, Any]], others: list[dict[str, Any]] | None, **changes: Any
) -> BenchmarkConfig:
    """A benchmark of labelled rows and others without a label; None: those are in the same file."""
    data = write_jsonl(folder / "own.jsonl", rows)
    beside = write_jsonl(folder / "inputs.jsonl", others) if others is not None else data
    table = {"data": str(data), "unlabelled": str(beside), **changes}
    given = {name: value for name, value in table.items() if value is not None}
    return build_config(SmallestConfig, {"benchmarks": [given]}).benchmarks[0]


def unlabelled(own: BenchmarkConfig) -> dict[Split, list[Example]]:
    parts: tuple[Split, ...] = ("selection", "evaluation")
    return {part: [e for e in load_examples(own, part, "") if e.answer == UNLABELLED] for part in parts}


def test_unlabelled_rows_are_to_compare_and_to_prove_on_in_hash_order_and_once(tmp_path: Path) -> None:
    others = [{"text": f"other {i}"} for i in range(40)]
    repeated = [{"text": "OTHER  3 "}, {"text": "number 5"}, {"text": "Number 6"}]  # two of them have a label
    found = unlabelled(job(tmp_path, labelled(60), others + repeated))
    texts = {part: [example.fields["context"].splitlines()[0] for example in own] for part, own in found.items()}
    assert sorted(texts["selection"] + texts["evaluation"]) == sorted(f"Text: {row['text']}" for row in others)
    assert 4 < len(texts["selection"]) < 18
    assert texts["evaluation"] != sorted(texts["evaluation"])
    again = unlabelled(job(tmp_path, labelled(60), others[::-1]))
    assert [e.fields["context"].splitlines()[0] for e in again["evaluation"]] == texts["evaluation"]
    fewer = unlabelled(job(tmp_path, labelled(60), others[:30]))  # no row moves to another part
    assert {e.index for e in fewer["evaluation"]} == {e.index for e in found["evaluation"] if e.index < 90}


def test_all_labelled_rows_are_to_tune_on_and_to_choose_with(tmp_path: Path) -> None:
    own = job(tmp_path, labelled(400), [{"text": "others"}])
    parts = {part: load_examples(own, part, "") for part in ("train", "selection")}
    assert sum(map(len, parts.values())) == 400
    assert 70 < len(parts["selection"]) < 130
    of_all = divide([[f"number {i}"] for i in range(400)])
    trained = {example.index for example in parts["train"]}
    assert trained >= set(of_all["train"])  # no row that was tuned on before is chosen with now


def test_rows_of_the_own_file_without_an_answer_count_as_unlabelled(tmp_path: Path) -> None:
    blank = [{"text": f"open {i}", "label": label} for i, label in enumerate(["", None, "  "])]
    own = job(tmp_path, labelled(60) + blank, None)
    assert own.labels == ("a", "b")
    assert {e.index for part in unlabelled(own).values() for e in part} == {60, 61, 62}
    both = job(tmp_path, labelled(60) + blank, [{"text": "other"}])
    assert {e.index for part in unlabelled(both).values() for e in part} == {60, 61, 62, 63}


def turns(text: str, *answer: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, *answer]}


def test_messages_need_no_answer_there(tmp_path: Path) -> None:
    rows = [turns(f"say {i}", {"role": "assistant", "content": f"{i} " * (1 + i % 3)}) for i in range(60)]
    own = job(tmp_path, rows, [turns("say what"), turns("say 7", {"role": "assistant", "content": "seen"})])
    (example,) = load_examples(own, "evaluation", "")
    assert (example.fields["context"], example.answer) == ("say what", UNLABELLED)


def test_calls_need_no_answer_there(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}
    rows = [turns(f"add {i}", call) | {"tools": tools} for i in range(60)]
    own = job(tmp_path, rows, [turns("add more") | {"tools": tools}])
    assert own.metric == "tool_call"
    (example,) = load_examples(own, "evaluation", "")
    assert example.answer == UNLABELLED


def test_choices_of_each_row_are_kept(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "choices": [f"{i}", "none"], "answer": "A"} for i in range(60)]
    own = job(tmp_path, rows, [{"question": "what?", "choices": ["this", "that"]}])
    (example,) = load_examples(own, "evaluation", "")
    assert (example.choices, example.answer) == (("this", "that"), UNLABELLED)


@pytest.mark.parametrize(
    ("others", "changes", "message"),
    [
        ([{"words": "other"}], {}, "inputs.jsonl: no column 'text'; present: words"),
        ([{"text": "number 3"}], {}, "inputs.jsonl: got no row without an answer to prove on; allowed: some"),
        (
            [{"text": "a"}],
            {"unlabelled": "none.csv"},
            "none.csv: no such file; allowed: a .csv, .jsonl, .json or .parquet file",
        ),
        (
            [{"text": "a"}],
            {"unlabelled": "a.txt"},
            "unlabelled: got 'a.txt'; allowed: a .csv, .tsv, .jsonl, .json or .parquet",
        ),
        ([{"text": "a"}], {"data": None, "name": "csqa"}, "unlabelled: got 'inputs.jsonl'; allowed: only with `data`"),
    ],
)
def test_bad_unlabelled_rows_are_refused(
    tmp_path: Path, others: list[dict[str, Any]], changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        load_examples(job(Path(), labelled(60), others, **changes), "evaluation", "")
    assert message in str(error.value)
