"""One file of the user's own: which rows are tuned on, chosen with and reported on, and how its columns are found."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from helpers import read_benchmark, render_split, write_jsonl
from tailored_llama.config import BenchmarkConfig, RunConfig, SmallestConfig, Work, build_config, validate_config
from tailored_llama.data import (
    PURPOSE,
    BenchmarkSource,
    Prompt,
    PromptSettings,
    Split,
    load_benchmark,
    load_questions,
    parts_of,
    read_prompts,
    render_prompts,
)
from tailored_llama.data.benchmarks import load_examples, read_examples
from tailored_llama.data.splits import SHARES, divide
from tailored_llama.errors import InputError
from tailored_llama.files import read_file
from tailored_llama.pipeline import rows_of
from tailored_llama.training import TuneSettings

Row = dict[str, Any]


def question(number: int) -> Row:
    return {"question": f"What is {number}?", "choices": [f"{number}", f"{number + 1}", "none"], "answer": "A"}


def parts(rows: list[Row], folder: Path, **changes: Any) -> dict[str, set[str]]:
    """The questions of each part, as the run reads them from a file with these rows."""
    own = read_benchmark(**{"data": write_jsonl(folder / "own.jsonl", rows), **changes})
    return {part: {e.fields["context"] for e in load_examples(own, part, "")} for part in SHARES}


def is_within(one: dict[str, set[str]], other: dict[str, set[str]]) -> bool:
    return all(one[part] <= other[part] for part in SHARES)


def test_a_row_stays_in_its_part_whatever_else_is_in_the_file(tmp_path: Path) -> None:
    rows = [question(i) for i in range(150)]
    before = parts(rows, tmp_path)
    assert parts(rows[::-1], tmp_path) == before
    assert parts(rows + rows, tmp_path) == before
    assert is_within(before, parts([question(i) for i in range(-300, 700)], tmp_path))
    assert is_within(parts(rows[40:], tmp_path), before)
    assert parts([row | {"id": i, "source": "exam"} for i, row in enumerate(rows)], tmp_path) == before
    worded = parts(rows, tmp_path, context="Q: {question}")
    assert {part: {text.removeprefix("Q: ") for text in texts} for part, texts in worded.items()} == {
        part: {text.removeprefix("Question: ").removesuffix("\nAnswer:") for text in texts}
        for part, texts in before.items()
    }


def test_files_of_one_content_are_divided_alike(tmp_path: Path) -> None:
    rows = [question(i) | {"choices": None, "a": "yes", "b": "no", "c": ""} for i in range(120)]
    frame = pd.DataFrame(rows).drop(columns="choices")
    frame.to_csv(tmp_path / "own.csv", index=False)
    frame.to_parquet(tmp_path / "own.parquet")
    frame.to_json(tmp_path / "own.jsonl", orient="records", lines=True)
    loaded = [
        [load_examples(read_benchmark(data=str(tmp_path / f"own.{suffix}")), part, "") for part in SHARES]
        for suffix in ("csv", "parquet", "jsonl")
    ]
    assert loaded[0] == loaded[1] == loaded[2]
    assert sum(map(len, loaded[0])) == 120


@pytest.mark.parametrize("seed", range(20))
def test_no_question_is_in_two_parts(tmp_path: Path, seed: int) -> None:
    """Rows that repeat others with another answer, order of choices, column or white space."""
    drawn = random.Random(seed)
    rows = []
    for i in range(drawn.randrange(60, 300)):
        row = question(drawn.randrange(i + 1))
        row["choices"] = drawn.sample(row["choices"], 3)
        row["answer"] = drawn.choice("ABC")
        row["question"] = drawn.choice(["{}", " {}", "{}\n"]).format(
            row["question"].replace(" ", drawn.choice([" ", "  "]))
        )
        rows.append(row | {"id": i})
    divided = parts(rows, tmp_path)
    plain = {part: [" ".join(text.split()) for text in texts] for part, texts in divided.items()}
    together = [text for texts in plain.values() for text in texts]
    assert len(together) == len(set(together)) == len({" ".join(row["question"].split()) for row in rows})


def test_parts_have_their_shares() -> None:
    divided = divide([[f"What is {i}?"] for i in range(10_000)])
    assert {part: len(rows) / 10_000 for part, rows in divided.items()} == pytest.approx(SHARES, abs=0.015)


def test_the_run_tunes_chooses_and_reports_on_rows_of_their_own_part(
    tmp_path: Path, folder: Callable[[str], Path]
) -> None:
    rows = [question(i % 150) for i in range(157)]
    own = read_benchmark(data=write_jsonl(tmp_path / "own.jsonl", rows))
    examples, out = folder("examples"), folder("prompts")
    counts = load_benchmark(settings=BenchmarkSource(own), work=Work(examples))
    assert (sum(counts.values()), counts["left_out"]) == (157, 7)
    held = {part: {e.index for e in read_examples(examples, part)} for part in SHARES}  # type: ignore[arg-type]
    size = counts["train"]
    sizes = {"shots": 50, "held_out": 50, "num_fewshot": 2}
    assert render_split(examples, out, own, "train", **sizes) == {"shots": 50, "held_out": size - 52}  # what is left
    drawn = [*read_prompts(out, "shots"), *read_prompts(out, "held_out")]
    assert {prompt.example for prompt in drawn} < held["train"]
    render_split(examples, out, own, "selection", count=20, **sizes)
    assert {prompt.example for prompt in read_prompts(out, "selection")} < held["selection"]
    render_split(examples, out, own, "evaluation", num_fewshot=2)
    assert {prompt.example for prompt in read_prompts(out, "evaluation")} == held["evaluation"]
    told = rf"^tuning\.shots: got 500, beside 1 to hold out \(tuning\.held_out\); allowed: at most {size} together"
    with pytest.raises(InputError, match=told):
        render_split(examples, out, own, "train", shots=500, held_out=50)


def rendered(run: RunConfig, rows: int, folder: Callable[[str], Path]) -> tuple[list[Prompt], int, str, Path]:
    """The shots of a run's first benchmark, of a file; how many are held out; what is told; and the prompts."""
    own, examples, out = run.benchmarks[0], folder(f"examples {rows}"), folder(f"prompts {rows}")
    load_benchmark(settings=BenchmarkSource(own), work=Work(examples))
    render_prompts(examples, settings=PromptSettings.of(run, own, "train"), work=Work(out))
    told = next((line for line in rows_of(run) if "tuning reads" in line), "")
    return read_prompts(out, "shots"), len(read_prompts(out, "held_out")), told, out


def tokens_of(shots: list[Prompt]) -> float:
    return sum(len(p.contexts[p.answer] + p.continuations[p.answer]) for p in shots) / 4


@pytest.fixture
def own(tmp_path: Path) -> BenchmarkConfig:
    return read_benchmark(data=write_jsonl(tmp_path / "own.jsonl", [question(i) for i in range(400)]))


@pytest.mark.parametrize("tokens", [100_000, 1_500, 200])
def test_as_many_rows_are_tuned_on_as_the_budget_allows_and_that_number_is_told(
    own: BenchmarkConfig, folder: Callable[[str], Path], tokens: int
) -> None:
    size = len(load_examples(own, "train", ""))
    run = validate_config({"benchmarks": [own], "tuning": {"tokens": tokens, "epochs": 2}})
    shots, held_out, told, out = rendered(run, 400, folder)
    assert held_out == 50
    if tokens == 100_000:
        why = "all but 50 held out"
        assert len(shots) == size - 50
    else:
        why = f"as many as tuning.tokens = {tokens:,} allow in 2 epochs"
        assert 0.85 * tokens < 2 * tokens_of(shots) < 1.05 * tokens
    assert told == f"{own.data}: tuning reads {len(shots)} of {size} rows, {why}."
    held = {prompt.example for prompt in read_prompts(out, "held_out")}
    assert not held & {prompt.example for prompt in shots}


def test_held_out_rows_have_the_answers_of_the_file_however_many_are_tuned_on(
    tmp_path: Path, folder: Callable[[str], Path]
) -> None:
    rows = [{"text": f"text {i}", "label": "often" if i % 3 else "rare"} for i in range(600)]
    run = RunConfig(benchmarks=(read_benchmark(data=write_jsonl(tmp_path / "own.jsonl", rows)),))
    *_, out = rendered(run, 600, folder)
    answers = [prompt.continuations[prompt.answer] for prompt in read_prompts(out, "held_out")]
    assert 8 < answers.count(" rare") < 25


@pytest.mark.parametrize("rows", [60, 150])
def test_fifty_rows_are_tuned_on_before_any_are_held_out(
    tmp_path: Path, folder: Callable[[str], Path], rows: int
) -> None:
    own = read_benchmark(data=write_jsonl(tmp_path / "own.jsonl", [question(i) for i in range(rows)]))
    size = len(load_examples(own, "train", ""))
    shots, held_out, told, _ = rendered(RunConfig(benchmarks=(own,)), rows, folder)
    assert (len(shots), held_out) == (min(50, size - 1), max(size - 50, 1))
    assert told.endswith(f": tuning reads {len(shots)} of {size} rows, all but {held_out} held out.")


def test_the_files_of_a_mixture_have_equal_parts_of_the_budget(
    own: BenchmarkConfig, folder: Callable[[str], Path]
) -> None:
    both = [own, own.model_copy(update={"name": "other"})]
    run = validate_config({"benchmarks": both, "tuning": {"examples": "mixture", "tokens": 3_000}})
    shots, _, told, _ = rendered(run, 400, folder)
    assert 450 < tokens_of(shots) < 525
    assert f": tuning reads {len(shots)} of " in told
    assert told in list(rows_of(run))
    assert TuneSettings.of(run, ["own", "other"]).shots is None  # all that are rendered


def test_benchmarks_that_are_no_file_keep_the_fifty_shots_of_the_paper(own: BenchmarkConfig) -> None:
    run = RunConfig(benchmarks=(BenchmarkConfig(name="piqa"),))
    (piqa,) = run.benchmarks
    assert (PromptSettings.of(run, piqa, "train").draw.shots, TuneSettings.of(run, ["piqa"]).shots) == (50, 50)
    assert run.tuned_on == "50 examples"
    assert RunConfig(benchmarks=(own,)).tuned_on == "at most 100,000 tokens of examples"


def test_the_key_of_the_examples_follows_the_file_and_not_its_path(
    tmp_path: Path, folder: Callable[[str], Path]
) -> None:
    rows = [question(i) for i in range(60)]
    one = read_benchmark(data=write_jsonl(tmp_path / "own.jsonl", rows))
    same = read_benchmark(data=write_jsonl(folder("other") / "own.jsonl", rows))
    assert BenchmarkSource(one).identity() == BenchmarkSource(same).identity()
    two_files = one.model_copy(update={"data": None, "kind": None, "train": one.data, "evaluation": one.data})
    assert BenchmarkSource(one).identity() != BenchmarkSource(two_files).identity()
    before = BenchmarkSource(one).identity()
    write_jsonl(tmp_path / "own.jsonl", rows[1:])
    assert BenchmarkSource(one).identity() != before


@pytest.mark.parametrize("part", SHARES)
def test_a_part_without_rows_is_refused(tmp_path: Path, part: Split) -> None:
    divided = parts([question(i) for i in range(60)], tmp_path)
    rows = [question(i) for i in range(60) if f"Question: What is {i}?\nAnswer:" not in divided[part]]
    with pytest.raises(InputError) as caught:
        parts(rows, tmp_path)
    assert str(caught.value) == (
        f"benchmarks.own.data: got {str(tmp_path / 'own.jsonl')!r}, whose {len(rows)} different rows leave none "
        f"{PURPOSE[part]}; allowed: a file with rows for every part, 150 or more"
    )


def named(columns: str, tmp_path: Path, **changes: Any) -> BenchmarkConfig:
    """The benchmark of a file that has these columns."""
    path = tmp_path / "my rows.csv"
    path.write_text(columns + "\n" + columns + "\n")
    return read_benchmark(data=str(path), **changes)


@pytest.mark.parametrize(
    ("columns", "context", "choices", "answer"),
    [
        ("id,question,a,b,c,answer", "Question: {question}\nAnswer:", ("a", "b", "c"), "answer"),
        ("Answer,B,A,Question", "Question: {Question}\nAnswer:", ("A", "B"), "Answer"),
        ("prompt,choices,label", "prompt", "choices", "label"),
        ("text,choices,label,d", "text", "choices", "label"),  # d alone is no choice
        ("text,options,label", "text", "options", "label"),
        ("question,Option A,Option B,answer", "Question: {question}\nAnswer:", ("Option A", "Option B"), "answer"),
        ("text,option2,option1,label", "text", ("option1", "option2"), "label"),
        (
            "text,answer," + ",".join(f"option{i}" for i in range(1, 11)),
            "text",
            tuple(f"option{i}" for i in range(1, 11)),
            "answer",
        ),
        ("text,choices,options,answer", "text", "choices", "answer"),
        ("context,a,b,x,answer", None, None, None),  # a, b, x: not in a row
    ],
)
def test_columns_with_common_names_are_found(
    tmp_path: Path, columns: str, context: str | None, choices: Any, answer: str
) -> None:
    if context is None:
        with pytest.raises(
            InputError, match=r"choices is not set, and \(a, b, x\) leave one out; allowed: columns of the file \("
        ):
            named(columns, tmp_path)
        return
    own = named(columns, tmp_path)
    assert (own.name, own.context, own.choices, own.answer) == ("my-rows", context, choices, answer)


def test_what_is_set_is_not_looked_for(tmp_path: Path) -> None:
    own = named("question,text,a,b,answer", tmp_path, name="mine", context="text", answer="a")
    assert (own.name, own.context, own.choices, own.answer) == ("mine", "text", ("a", "b"), "a")
    written = named("question,a,b,answer", tmp_path, metric="f1")
    assert (written.choices, written.answer) == (None, "answer")


def test_columns_that_are_not_clear_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        named("id,review,text,x,reply", tmp_path, kind="choices")
    assert str(caught.value) == (
        "benchmarks.my-rows: context is not set, and review and text may be meant; choices is not set, and no column "
        "is called choices, or a, b and so on; answer is not set, and no column is called answer, completion, "
        "output, response, target, label, category, class, intent, topic, sentiment; allowed: columns of the file (id, "
        "review, text, x, reply), named as rows.context, rows.answer and so on"
    )


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError) as caught:
        validate_config({"benchmarks": [str(path)]})
    assert str(caught.value).startswith(f"{path}: cannot be read (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("A.CSV", 'text, label\n"one, two", x\nthree, y\n,\n'),
        ("a.tsv", "text\tlabel\none, two\tx\nthree\ty\n"),
        ("a.json", '{"data": [{"text": "one, two", "label": "x"},\n {"text": "three", "label": "y"}]}'),
    ],
)
def test_files_as_people_have_them_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_file(tmp_path / name) == [{"text": "one, two", "label": "x"}, {"text": "three", "label": "y"}]


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (['"Well" he said', 'x "y"'], ['"Well" he said', 'x "y"']),
        (['"Well', "y", '"'], ['"Well', "y", '"']),
        (['"Well, ""he"" said"', "x"], ['Well, "he" said', "x"]),
        (['"two\nlines"', "x"], ["two\nlines", "x"]),
        (['"a\ttab"', "x"], ["a\ttab", "x"]),
    ],
)
def test_a_quote_in_a_tsv_is_text_unless_it_encloses_a_cell(tmp_path: Path, cells: list[str], read: list[str]) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{cell}\ty\n" for cell in cells))
    assert read_file(path) == [{"text": text, "label": "y"} for text in read]


def test_half_an_emoji_becomes_a_question_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d", "label": "whole \\ud83d\\ude00"}\n')
    assert read_file(tmp_path / "a.jsonl") == [{"text": "cut ?", "label": "whole 😀"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,label\nnumber 1, two,x\n", "got rows of 3 cells below a header of 2; allowed: a header"),
        ("a.json", '[{"text": "one"},\n]', "got a list that is no JSON ("),
        ("a.json", '[{"text": "one"}, null]', "row 1: got 'null'; allowed: one JSON object a line"),
        ("a.jsonl", '{"text": "one"}\nnull\n', "line 2: got 'null'; allowed: one JSON object a line"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        read_file(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_ends_like_a_file_is_one() -> None:
    run: RunConfig = validate_config({"benchmarks": ["piqa", "some/where.csv"]})
    assert [(own.name, own.data) for own in run.benchmarks] == [("piqa", None), ("where", "some/where.csv")]


def test_a_search_chooses_with_train_rows_that_nothing_else_reads(tmp_path: Path) -> None:
    rows = [question(i) for i in range(200)]
    files = {"train": rows[:150] + rows[:5], "evaluation": rows[140:]}
    table = {"name": "own", "context": "question", "choices": "choices", "answer": "answer"}
    table |= {name: str(write_jsonl(tmp_path / f"{name}.jsonl", own)) for name, own in files.items()}
    searched, alone = (
        build_config(kind, {"benchmarks": [table]}).benchmarks[0] for kind in (SmallestConfig, RunConfig)
    )
    held = {part: {e.fields["context"] for e in load_examples(searched, part, "")} for part in parts_of(searched)}
    assert [*held] == ["train", "selection", "evaluation"]
    assert len(set().union(*held.values())) == sum(map(len, held.values())) == 200
    assert 20 < len(held["selection"]) < 50
    assert {*load_questions(searched, "").values()} == held["train"]
    assert parts_of(alone) == ("train", "evaluation")
    assert {*load_questions(alone, "").values()} == held["train"] | held["selection"]
