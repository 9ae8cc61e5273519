"""Rows as people have them: which columns are read, what a label is, and what is refused."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from helpers import read_benchmark, save_chatting_llama, save_worded_llama, spm_tokenizer, words, write_jsonl
from tailored_llama.config import (
    BenchmarkConfig,
    ModelConfig,
    RunConfig,
    SmallestConfig,
    resolve,
    validate_as,
    validate_config,
)
from tailored_llama.data import PURPOSE, BenchmarkSource, headline_metric
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.data.splits import SHARES
from tailored_llama.errors import InputError
from tailored_llama.pipeline import rows_of
from tailored_llama.serving import write_gguf

Row = dict[str, Any]


def labelled(count: int, labels: int = 2, column: str = "label") -> list[Row]:
    return [{"text": f"text {i}", column: f"label {i % labels}"} for i in range(count)]


def chat(user: str, assistant: str, system: str = "") -> Row:
    turns = {"system": system, "user": user, "assistant": assistant}
    return {"messages": [{"role": role, "content": text} for role, text in turns.items() if text]}


def talk(*messages: Row) -> Row:
    return {"messages": [*messages]}


def trl(*messages: Row) -> Row:
    """A prompt and its completion, as TRL has conversations."""
    return {"prompt": [*messages[:-1]], "completion": [messages[-1]]}


def sharegpt(turns: dict[str, str]) -> Row:
    return {"conversations": [{"from": role, "value": text} for role, text in turns.items()]}


def called(user: str, name: str, arguments: Any, key: str = "tool_calls") -> Row:
    """A message that is answered by a call, in the form of OpenAI, which writes arguments as JSON, or its older one."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    calls = {"tool_calls": [{"id": "1", "type": "function", "function": function}], "function_call": function}
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": None, key: calls[key]}]}


def read(folder: Path, rows: list[Row], **fields: Any) -> BenchmarkConfig:
    return read_benchmark(data=write_jsonl(folder / "own.jsonl", rows), **fields)


def prompts(own: BenchmarkConfig) -> dict[str, str]:
    """The right answer to every context."""
    examples = [example for part in PURPOSE for example in load_examples(own, part, "")]
    return {example.fields["context"]: example.choices[example.answer] for example in examples}


def refusal(folder: Path, rows: list[Row], **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        prompts(read(folder, rows, **fields))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("benchmarks.own: ").removeprefix("own.jsonl ")


def test_a_text_and_its_label_in_every_kind_of_file(tmp_path: Path) -> None:
    rows = labelled(150)
    frame, files = pd.DataFrame(rows), [tmp_path / f"own.{suffix}" for suffix in ("csv", "parquet", "jsonl", "json")]
    frame.to_csv(files[0], index=False)
    frame.to_parquet(files[1])
    frame.to_json(files[2], orient="records", lines=True)
    files[3].write_text(json.dumps(rows, indent=1))
    for file in files:
        (own,) = validate_config({"benchmarks": [str(file)]}).benchmarks
        assert (own.kind, own.labels, headline_metric(own)) == ("labels", ("label 0", "label 1"), "acc")
        assert prompts(own) == {f"Text: {row['text']}\nLabel:": row["label"] for row in rows}
        assert all(example.choices == own.labels for example in load_examples(own, "train", ""))


@pytest.mark.parametrize(
    ("row", "context", "answer"),
    [
        ({"Sentence": "one", "Category": "x"}, "Sentence: one\nCategory:", "x"),
        ({"review": "one", "label": 3}, "Review: one\nLabel:", "3"),
        ({"prompt": "one", "completion": "x"}, "one", "x"),
        ({"instruction": "Say.", "input": "one", "output": "x"}, "Say.\n\none", "x"),
        ({"instruction": "Say one.", "input": "", "output": "x"}, "Say one.", "x"),
        ({"instruction": "Say.", "context": "one", "response": "x"}, "Say.\n\none", "x"),
        ({"question": "one?", "answer": "x"}, "Question: one?\nAnswer:", "x"),
        ({"question": "What?", "passage": "one", "answer": "x"}, "Passage: one\nQuestion: What?\nAnswer:", "x"),
        ({"Context": "one", "Query": "What?", "answer": "x"}, "Context: one\nQuery: What?\nAnswer:", "x"),
        ({"instruction": "Say.", "text": "one", "answer": "x"}, "Say.\n\none", "x"),
        ({"prompt": "Say.", "article": "one", "answer": "x"}, "one\n\nSay.", "x"),
        ({"document": "one", "label": "x"}, "Document: one\nLabel:", "x"),
        (chat("one", "x"), "one", "x"),
        (chat("one", "x", "Be short."), "one", "x"),
        (chat("one", "x", " "), "one", "x"),
        (talk({"role": "developer", "content": "Be short."}, *chat("one", "x")["messages"]), "one", "x"),
        (talk({"role": "developer", "content": ""}, *chat("one", "x")["messages"]), "one", "x"),
        (trl(*chat("one", "x")["messages"]), "one", "x"),
        (trl(*chat("one", "x", "Be short.")["messages"]), "one", "x"),
        ({key: json.dumps(cell) for key, cell in trl(*chat("one", "x")["messages"]).items()}, "one", "x"),
        (trl(*chat("Hi.", "Yes?")["messages"], *chat("one", "x")["messages"]), "Hi.\n\nYes?\n\none", "x"),
        ({"messages": json.dumps(chat("one", "x")["messages"])}, "one", "x"),
        ({"messages": chat("one", "x")["messages"], "tools": []}, "one", "x"),
        (sharegpt({"human": "one", "gpt": "x"}), "one", "x"),
        (sharegpt({"system": "Be short.", "User": "one", "Assistant": "x"}), "one", "x"),
        (sharegpt({"human": "one", "gpt": "x"}) | {"system": "Be short."}, "one", "x"),
        ({"system": "Be short.", "instruction": "one", "output": "x", "history": []}, "Be short.\n\none", "x"),
    ],
)
def test_the_forms_that_rows_have(tmp_path: Path, row: Row, context: str, answer: str) -> None:
    text = json.dumps(row).replace
    rows = [json.loads(text("one", f"text {i}")) for i in range(150)]
    own = read(tmp_path, rows, kind="written")
    assert prompts(own) == {context.replace("one", f"text {i}"): answer for i in range(150)}


def test_a_system_message_is_the_instruction_if_all_rows_share_it(tmp_path: Path, tiny: Path) -> None:
    rows = [chat(f"text {i}", "ab"[i % 2], "Be short.") for i in range(150)]
    own = read(tmp_path, rows)
    assert (own.instruction, own.labels) == ("Be short.", ("a", "b"))
    _, shown, *_ = rows_of(RunConfig(benchmarks=(own,), model=ModelConfig(source=str(tiny))))
    assert shown.startswith(f"{own.data}: the prompt 'Be short.\\n\\ntext ")
    before = {part: {e.index for e in load_examples(own, part, "")} for part in SHARES}
    differing = read(tmp_path, [*rows, chat("text", "a", "Be long.")])
    assert differing.instruction is None
    assert {"Be short.\n\ntext 0", "Be long.\n\ntext"} <= prompts(differing).keys()
    after = {part: {e.index for e in load_examples(differing, part, "")} for part in SHARES}
    assert all(before[part] <= after[part] for part in SHARES)  # no row has moved


def answers(kind: str, count: int = 1500) -> list[str]:
    draw = random.Random(0)
    vocabulary = words(2000).split(" ")
    drawn = {
        "57 labels": lambda: f"subject {draw.randrange(57)}",
        "2 labels": lambda: draw.choice(["yes", "no"]),
        "stars": lambda: str(draw.randint(1, 5)),
        "sentences": lambda: " ".join(draw.sample(vocabulary, 6)),
        "sums": lambda: str(draw.randint(0, 40)),
        "objects": lambda: json.dumps({"on": draw.choice([True, False])}),
        "long": lambda: draw.choice("ab") * 101,
    }
    return [drawn[kind]() for _ in range(count)]


@pytest.mark.parametrize(
    ("kind", "column", "count", "expected"),
    [
        ("57 labels", "completion", 14_000, "labels"),
        ("57 labels", "completion", 400, "labels"),
        ("2 labels", "completion", 300, "labels"),
        ("stars", "completion", 300, "labels"),
        ("sums", "label", 300, "labels"),
        ("sentences", "completion", 300, "written"),
        ("sentences", "label", 300, "written"),
        ("sums", "completion", 1500, "written"),
        ("objects", "completion", 300, "json"),
        ("long", "completion", 300, "written"),
    ],
)
def test_few_answers_that_come_again_and_again_are_labels(
    tmp_path: Path, kind: str, column: str, count: int, expected: str
) -> None:
    rows = [{"prompt": f"text {i}", column: answer} for i, answer in enumerate(answers(kind, count))]
    own = read(tmp_path, rows)
    assert own.kind == expected
    assert own.labels == (tuple(sorted({row[column] for row in rows})) if expected == "labels" else None)
    assert headline_metric(own) == {"labels": "acc", "json": "json"}.get(expected, "exact_match")


@pytest.mark.parametrize(
    ("cell", "kind", "texts"),
    [
        ({"a": "é", "b": [1.0, None]}, "json", ('{"a": "é", "b": [1.0, null]}',)),
        ('{\n "a": 1}\n', "json", ('{\n "a": 1}',)),
        ([{"a": 1}, {"b": 2}], "json", ('[{"a": 1}, {"b": 2}]',)),
        (['{"a": 1}', '{"a": 2}'], "json", ('{"a": 1}', '{"a": 2}')),
        ('["{\\"a\\": 1}", "{}"]', "json", ('{"a": 1}', "{}")),
        ({"name": "f", "arguments": {"a": 1}}, "call", ('{"name": "f", "arguments": {"a": 1}}',)),
        (['{"name": "f", "arguments": {}}', '{"name": "g", "arguments": {}}'], "call", None),
        ({"text": ["six", "6"], "answer_start": [7, 7]}, "written", ("six", "6")),
        (["ten", "10"], "written", ("ten", "10")),
        ("[1, 2]", "written", ("[1, 2]",)),
        ('{"a": NaN}', "written", ('{"a": NaN}',)),
        ("[" * 5000, "written", ("[" * 5000,)),
    ],
)
def test_answers_that_are_objects_are_json(tmp_path: Path, cell: Any, kind: str, texts: Any) -> None:
    own = read(tmp_path, [{"prompt": f"text {i}", "completion": cell} for i in range(150)])
    assert own.kind == kind
    assert headline_metric(own) == {"json": "json", "call": "tool_call", "written": "exact_match"}[kind]
    assert {example.choices for example in load_examples(own, "train", "")} == {texts or tuple(cell)}
    assert own.stop == (("\n",) if kind == "written" else ())


@pytest.mark.parametrize(
    ("choices", "answer", "index"),
    [
        ({"B": "two", "A": "one"}, "A", 0),
        ('{"A": "one", "B": "two"}', "(b)", 1),
        (["2", "3"], "3", 1),  # a text goes before an index
        (["one ", "two"], "one", 0),
        (["B", "A"], "A.", 1),
    ],
)
def test_the_answer_to_choices_is_a_letter_or_a_text(tmp_path: Path, choices: Any, answer: str, index: int) -> None:
    own = read(tmp_path, [{"question": f"{i}?", "options": choices, "answer": answer} for i in range(150)])
    assert own.choices == "options"
    assert {example.answer for example in load_examples(own, "train", "")} == {index}


def test_columns_that_may_be_options_are_none_beside_a_category(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "Option 1": "red", "Option 2": "L", "category": "ab"[i % 2]} for i in range(150)]
    assert read(tmp_path, rows).labels == ("a", "b")


def test_a_list_of_texts_that_a_message_is_is_one_answer(tmp_path: Path) -> None:
    own = read(tmp_path, [chat(f"text {i}", json.dumps(["Oslo", f"Rome {i}"])) for i in range(150)])
    assert own.kind == "json"
    assert prompts(own)["text 3"] == '["Oslo", "Rome 3"]'


def test_a_call_has_no_field_that_parquet_adds(tmp_path: Path) -> None:
    function = {"name": "f", "arguments": {"a": 1}}
    tool = {"name": "f", "parameters": {"a": {"type": "int"}}}
    rows = [chat(f"text {i}", "") | {"functions": [tool]} for i in range(150)]
    for row in rows:
        row["messages"].append({"role": "assistant", "function_call": function})
    rows[1]["messages"][-1] = {"role": "assistant", "function_call": {"name": "f", "arguments": {"b": 2}}}
    pd.DataFrame(rows).to_parquet(tmp_path / "own.parquet")
    own = read_benchmark(data=str(tmp_path / "own.parquet"))
    assert prompts(own)[f"{json.dumps(tool)}\n\ntext 0"] == json.dumps(function)


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_a_call_is_asked_with_its_tools(tmp_path: Path, key: str) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    rows = [called(f"text {i}", "f", {"a": i}, key) | {"tools": json.dumps(tools)} for i in range(150)]
    own = read(tmp_path, rows)
    assert (own.kind, own.metric, own.stop, own.context) == ("call", "tool_call", (), "user")
    written = "".join(json.dumps(tool) + "\n" for tool in tools)
    assert prompts(own) == {f"{written}\ntext {i}": f'{{"name": "f", "arguments": {{"a": {i}}}}}' for i in range(150)}
    how, *_ = rows_of(RunConfig(benchmarks=(own,)))
    assert "a call written by the model: 150 different ones, ended by the end of text" in how
    other = [called(row["messages"][0]["content"], "f", {"a": 0}) | {"tools": tools[:1]} for row in rows]
    assert len(prompts(read(tmp_path, [*rows, *other]))) == 300  # the same text with other tools is another row


def test_several_calls_are_a_list(tmp_path: Path) -> None:
    rows = [called(f"text {i}", "f", {}) for i in range(150)]
    for row in rows:
        row["messages"][1]["tool_calls"] *= 2
    own = read(tmp_path, rows)
    one = '{"name": "f", "arguments": {}}'
    assert (own.context, set(prompts(own).values())) == ("user", {f"[{one}, {one}]"})


def test_what_is_set_overrules_what_is_found(tmp_path: Path) -> None:
    rows = labelled(150)
    assert read(tmp_path, rows, kind="written").metric == "exact_match"
    assert read(tmp_path, rows, metric="f1").kind == "written"
    assert read(tmp_path, rows, labels=["label 0", "label 1", "label 2"]).labels == ("label 0", "label 1", "label 2")
    named = [{"ask": row["text"], "reply": row["label"]} for row in rows]
    own = read(tmp_path, named, context="{ask} ->", answer="reply")
    assert (own.kind, prompts(own)["text 0 ->"]) == ("labels", "label 0")
    (own,) = validate_config({"benchmarks": [str(own.data)], "rows": {"context": "ask", "answer": "reply"}}).benchmarks
    assert (own.kind, own.context) == ("labels", "ask")


def test_a_configuration_with_all_that_the_file_decides_does_not_read_it_again(tmp_path: Path) -> None:
    for rows in (labelled(150), [chat(f"text {i}", f"line {i}\nline") for i in range(150)]):
        own = read(tmp_path, rows)
        (tmp_path / "own.jsonl").write_text("{")
        assert read_benchmark(**own.model_dump()) == own


def test_validation_opens_no_file(tmp_path: Path) -> None:
    """A configuration that is deployed is validated where its files are not."""
    broken = tmp_path / "own.csv"
    broken.write_text("\0")
    (own,) = validate_as(RunConfig, {"benchmarks": [str(broken)]}).benchmarks
    assert (own.name, own.context, own.kind) == ("own", None, None)
    with pytest.raises(InputError, match=r"own\.csv: "):
        resolve(RunConfig(benchmarks=(own,)))


def test_resolving_adds_to_what_is_set_and_changes_nothing_twice(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "own.jsonl", labelled(150))
    given = validate_as(SmallestConfig, {"benchmarks": [file, "piqa"], "seed": 3})
    found = resolve(given)
    assert found.benchmarks == (read_benchmark(data=file), BenchmarkConfig(name="piqa", is_divided=True))
    assert found.model_copy(update={"benchmarks": given.benchmarks}) == given
    assert resolve(found) is found


def test_labels_that_are_set_are_those_of_any_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [{"text": "one", "label": 1}, {"text": "two", "label": "no"}])
    fields = {"evaluation": path, "context": "text", "answer": "label", "labels": ["no", "yes"]}
    own = BenchmarkConfig(name="mine", **fields)
    assert [e.choices[e.answer] for e in load_examples(own, "evaluation", "")] == ["yes", "no"]


def test_the_key_of_the_examples_follows_the_labels_and_the_form(tmp_path: Path) -> None:
    rows = labelled(150)
    one = read(tmp_path, rows)
    keys = [
        BenchmarkSource(own).identity()
        for own in (
            one,
            read(tmp_path, rows, labels=["label 1", "label 0"]),
            read(tmp_path, rows, kind="written"),
            one.model_copy(update={"form": "alpaca"}),
        )
    ]
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == 4


@pytest.mark.parametrize(
    ("longest", "tokens", "stop"),
    [
        ("short", 32, "\n"),
        ("42" * 30, 68, "\n"),
        ("word " * 9000, 2 * 9000 + 8, "\n"),
        ("one\ntwo", 32, "\n\n"),
        ("one\n\ntwo\n", 32, "\n\n\n"),
        ("a sentence of ordinary words " * 10, 10 * 10 + 8, "\n"),
    ],
)
def test_a_written_answer_is_as_long_as_the_longest_and_is_not_cut_at_its_line_breaks(
    tmp_path: Path, longest: str, tokens: int, stop: str
) -> None:
    rows = [{"prompt": f"text {i}", "completion": f"answer {i}"} for i in range(150)]
    own = read(tmp_path, [*rows, {"prompt": "text", "completion": longest}])
    assert (own.max_new_tokens, own.stop) == (tokens, (stop,))
    set_by_hand = read(tmp_path, rows, max_new_tokens=5, stop=["."])
    assert (set_by_hand.max_new_tokens, set_by_hand.stop) == (5, (".",))


MESSAGES = "column messages: got"
TURNS = "allowed: system (or none), then user and assistant in turn, assistant last"
CALL = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}], "content": None}]}
PICTURE = [{"type": "image_url", "image_url": {}}]
REFUSED: dict[str, tuple[list[Row], Row, str]] = {
    "a label that occurs once": (
        labelled(150),
        {"text": "x", "label": "lable 1"},
        "column label: got one row for each of these labels: 'lable 1' (row 150); allowed: two rows or more for each "
        "label",
    ),
    "an answer that occurs once": (
        labelled(150, column="answer"),
        {"text": "x", "answer": "lable 1"},
        "column answer: got one row for each of these labels: 'lable 1' (row 150); allowed: two rows or more for each "
        'label, or kind = "written"',
    ),
    "no label": (
        labelled(150),
        {"text": "x", "label": " "},
        "row 150: column label: got ' '; allowed: one of the 2 labels",
    ),
    "no text": (labelled(150), {"text": None, "label": "label 0"}, "row 150: column text: got None; allowed: a text"),
    "one label": (
        labelled(150, 1),
        labelled(1, 1)[0],
        "column label: got no two different labels; allowed: two or more",
    ),
    "no written answer": (
        [{"prompt": f"{i}", "completion": f"{i} is"} for i in range(150)],
        {"prompt": "x", "completion": ""},
        "row 150: column completion: got ''; allowed: a text, or a list of texts",
    ),
    "mixed kinds": (
        [{"prompt": f"{i}", "completion": "yes"} for i in range(150)],
        {"prompt": "x", "completion": {"name": "call", "arguments": {}}},
        "column completion: got a text in row 0 and a call in row 150; allowed: answers of one kind",
    ),
    "two messages of the user in a row": (
        [chat("x", "y")],
        {"messages": chat("x", "y")["messages"][:1] + chat("x", "y")["messages"]},
        f"row 1: {MESSAGES} the roles user, user, assistant; {TURNS}",
    ),
    "a message after the answer": (
        [chat("x", "y")],
        {"messages": chat("x", "y")["messages"] + chat("x", "y")["messages"][:1]},
        f"row 1: {MESSAGES} the roles user, assistant, user; {TURNS}",
    ),
    "a system message in between": (
        [chat("x", "y")],
        {"messages": chat("x", "y")["messages"] + chat("x", "y", "z")["messages"]},
        f"row 1: {MESSAGES} the roles user, assistant, system, user, assistant; {TURNS}",
    ),
    "no answer": (
        [chat("x", "y")],
        {"messages": chat("x", "y")["messages"][:1]},
        f"row 1: {MESSAGES} the roles user; {TURNS}",
    ),
    "calls that are none": (
        [chat("x", "y")],
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": 5}]},
        f"row 1: {MESSAGES} the call 5; allowed: a name, and arguments as an object",
    ),
    "an empty answer": (
        [chat("x", "y")],
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]},
        f"row 1: {MESSAGES} ' ' from assistant; allowed: a text",
    ),
    "a call without a name": (
        [chat("x", "y")],
        CALL,
        f"row 1: {MESSAGES} the call [{{}}]; allowed: a name, and arguments as an object",
    ),
    "tools without a call": (
        [chat("x", "y")],
        chat("x", "y") | {"tools": [{"type": "function"}]},
        "row 1: got tools and the answer 'y'; allowed: a call as the answer",
    ),
    "tools that are none": (
        [chat("x", "y")],
        chat("x", "y") | {"tools": "hammer"},
        "row 1: column tools: got 'hammer'; allowed: a list of tools",
    ),
    "calls and words": (
        [called("x", "f", {"a": 1}), called("x", "f", {"a": 2})],
        chat("x", "y"),
        'column assistant: got a call in row 0 and a text in row 2; allowed: answers of one kind, or kind = "written"',
    ),
    "objects and words": (
        [{"prompt": f"{i}", "completion": {"a": i}} for i in range(150)],
        {"prompt": "x", "completion": "none"},
        "column completion: got JSON in row 0 and a text in row 150; allowed: answers of one kind",
    ),
    "no JSON": (
        [{"prompt": f"{i}", "completion": {"a": i}} for i in range(150)],
        {"prompt": "x", "completion": None},
        "row 150: column completion: got None; allowed: JSON",
    ),
    "several labels": (
        [{"text": f"text {i}", "label": ["a", "b"][: 1 + i % 2]} for i in range(150)],
        {"text": "x", "label": ["a"]},
        "column label: got ['a', 'b'] in row 1; allowed: one label, or kind = \"json\" (the list is the answer) or "
        '"written" (each text is a right answer)',
    ),
    "choices counted from 1": (
        [{"question": f"{i}?", "a": "x", "b": "y", "c": "z", "answer": 1 + i % 2} for i in range(150)],
        {"question": "?", "a": "x", "b": "y", "c": "z", "answer": 2},
        "column answer: got numbers from 1 to 2; allowed: a choice's letter, its text, or its index, of which the "
        "first is 0",
    ),
    "a call in an earlier turn": (
        [chat("x", "y")],
        talk(*called("x", "f", {"a": 1})["messages"], *chat("x", "y")["messages"]),
        f"row 1: {MESSAGES} a call before the last message; allowed: a call as the answer",
    ),
    "a history": (
        [{"instruction": "x", "output": "y"}],
        {"instruction": "x", "output": "y", "history": [["x", "y"]]},
        "row 1: column history: got [['x', 'y']]; allowed: none, or all turns as messages",
    ),
    "a picture": (
        [chat("x", "y")],
        {"messages": [{"role": "user", "content": PICTURE}, {"role": "assistant", "content": "x"}]},
        f"row 1: {MESSAGES} {PICTURE!r} from user; allowed: a text",
    ),
    "a call of a tool before the answer": (
        [chat("x", "y")],
        talk(
            *called("Is it raining in Oslo?", "weather", {"city": "Oslo"})["messages"],
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
            {"role": "assistant", "content": "Yes."},
        ),
        f"row 1: {MESSAGES} the roles user, assistant, tool, assistant; {TURNS}",
    ),
    "a completion that is a text": (
        [trl(*chat("x", "y")["messages"])],
        trl(*chat("x", "y")["messages"]) | {"completion": "y"},
        "row 1: column completion: got 'y'; allowed: a list of messages",
    ),
    "an empty completion": (
        [trl(*chat("x", "y")["messages"])],
        trl(*chat("x", " ")["messages"][:1], {"role": "assistant", "content": " "}),
        "row 1: columns prompt and completion: got ' ' from assistant; allowed: a text",
    ),
    "a completion of the user": (
        [trl(*chat("x", "y")["messages"])],
        trl({"role": "user", "content": "x"}, {"role": "user", "content": "y"}),
        f"row 1: columns prompt and completion: got the roles user, user; {TURNS}",
    ),
    "another form": (
        [chat("x", "y")],
        {"text": "x", "label": "y"},
        f"row 1: {MESSAGES} None; allowed: a list of messages",
    ),
    "a long cell": (
        [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(150)],
        {"text": [0] * 99, "label": "a"},
        f"row 150: column text: got {str([0] * 99)[:80]}; allowed: a text",
    ),
    "no messages": ([chat("x", "y")], {"messages": "hello"}, f"row 1: {MESSAGES} 'hello'; allowed: a list of messages"),
}


@pytest.mark.parametrize(("rows", "bad", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_rows_are_one_line(tmp_path: Path, rows: list[Row], bad: Row, message: str) -> None:
    assert refusal(tmp_path, [*rows, bad]) == message


def test_fields_that_contradict_each_other_are_one_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, labelled(150), kind="written", metric="acc") == (
        "benchmarks.own.metric: got 'acc' with kind = 'written'; allowed: exact_match or f1"
    )
    assert refusal(tmp_path, labelled(150), kind="labels", metric="f1") == (
        "benchmarks.own.metric: got 'f1' with kind = 'labels'; allowed: acc or acc_norm"
    )
    assert refusal(tmp_path, labelled(150), kind="json", metric="f1") == (
        "benchmarks.own.metric: got 'f1' with kind = 'json'; allowed: json"
    )
    assert refusal(tmp_path, labelled(150), metric=["json"]).startswith("benchmarks.0.metric: got ['json']; allowed: ")
    assert refusal(tmp_path, labelled(150), answer="lable") == (
        "benchmarks.own.answer: got 'lable'; allowed: a column (text, label)"
    )
    assert refusal(tmp_path, labelled(150), form="chat").startswith("benchmarks.0.form: got 'chat'; allowed: ")
    assert refusal(tmp_path, labelled(150), kind=["labels"]).startswith("benchmarks.0.kind: got ['labels']; allowed: ")
    assert refusal(tmp_path, labelled(150), answer=["label"]).startswith("benchmarks.0.answer: got ['label']; ")
    with pytest.raises(InputError, match=r"^rows: got \{'kind': 'written'\}; allowed: a table, beside a benchmark "):
        validate_config({"benchmarks": ["piqa"], "rows": {"kind": "written"}})


def test_the_first_lines_say_how_rows_are_read(tmp_path: Path, tiny: Path) -> None:
    own = read(tmp_path, labelled(700, 14))
    how, shown, *_ = rows_of(RunConfig(benchmarks=(own,)))
    assert how.startswith(
        f"{own.data}: the context is 'Text: {{text}}\\nLabel:', the answer is in the column label, one of 14 labels: "
    )
    assert how.count("(50 rows)") == 14
    first = load_examples(own, "train", "")[0]
    right = first.choices[first.answer]
    assert shown == f"{own.data}: the prompt {first.fields['context']!r} has the answer {f' {right}<|im_end|>'!r}."
    many = read(tmp_path, [*labelled(183, 61), {"text": "more", "label": "label 7"}])
    how, *_ = rows_of(RunConfig(benchmarks=(many,)))
    assert how.endswith("one of 61 labels: from label 7 (4 rows) to label 9 (3 rows).")
    written = read(tmp_path, [chat(f"text {i}", f"line {i}\nline") for i in range(150)])
    how, *_ = rows_of(RunConfig(benchmarks=(written,), model=ModelConfig(source=str(tiny))))
    assert how == (
        f"{written.data}: messages, the context is '{{user}}', the answer is in the column assistant, written by the "
        "model: 150 different ones, ended by '\\n\\n'."
    )


def test_a_long_text_that_nothing_reads_is_refused_and_short_cells_are_told(tmp_path: Path) -> None:
    short = [{"id": f"{i:040}", "day": "2026-01-01", "link": f"https://example.org/{i:030}"} for i in range(150)]
    rows = [{**short[i], "question": f"{i}?", "answer": f"x {i}"} for i in range(150)]
    own = read(tmp_path, rows)
    assert f"{own.data}: not used: id, day, link." in rows_of(RunConfig(benchmarks=(own,)))
    story = "Once upon a time, there was a tailor who had {} sons."
    told = [row | {"story": story.format(i)} for i, row in enumerate(rows)]
    without = "Question: {question}\\nAnswer:"
    assert refusal(tmp_path, told) == (
        "column story: got a long text that differs by row and is not used; allowed: "
        f'rows.context = "{{story}}\\n{without}" to use it, or rows.context = "{without}" to leave it out'
    )
    using = read(tmp_path, told, context=f"{{story}}\n{without}".replace("\\n", "\n"))
    assert f"{story.format(3)}\nQuestion: 3?\nAnswer:" in prompts(using)
    leaving = read(tmp_path, told, context="{question}")
    assert f"{own.data}: not used: id, day, link, story." in rows_of(RunConfig(benchmarks=(leaving,)))
    assert read(tmp_path, [row | {"story": story} for row in rows]).context == own.context  # it differs in no row


def test_the_columns_of_a_form_are_told(tmp_path: Path) -> None:
    long = "Below is an instruction. Write a response that completes task {}."
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"x {i}", "text": long.format(i)} for i in range(150)]
    own = read(tmp_path, rows)
    lines = [*rows_of(RunConfig(benchmarks=(own,)))]
    assert f"{own.data}: read as alpaca: instruction, input, output." in lines
    assert f"{own.data}: not used: text." in lines


def test_a_free_text_in_an_answer_of_json_is_told(tmp_path: Path) -> None:
    why = "The customer writes about order {} and wants to have it soon."
    rows = [{"prompt": f"{i}", "completion": {"topic": "parcel", "why": why.format(i), "id": i}} for i in range(150)]
    own, same = read(tmp_path, rows), {"topic": "parcel", "why": why}
    told = (
        f"warning: {own.data}: of the answers in JSON, why is free text. An answer is right only if it equals the "
        "row's in every field."
    )
    assert told in rows_of(RunConfig(benchmarks=(own,)))
    own = read(tmp_path, [row | {"completion": same} for row in rows])
    assert not any("free text" in line for line in rows_of(RunConfig(benchmarks=(own,))))


def test_the_first_lines_show_messages_as_the_base_s_chat_template_asks_them(tmp_path: Path) -> None:
    checkpoint, earlier = save_chatting_llama(tmp_path / "chatting"), chat("Hello.", "Yes?")["messages"]
    write_gguf(checkpoint, gguf_type="f16", out=tmp_path / "model.gguf")
    rows = [{"messages": earlier + chat(f"text {i}", "ab"[i % 2])["messages"]} for i in range(150)]
    own = read(tmp_path, rows)
    for source in (checkpoint, tmp_path / "model.gguf"):
        _, shown, *_ = rows_of(RunConfig(benchmarks=(own,), model=ModelConfig(source=str(source))))
        before = (
            "<|im_start|>user\\nHello.<|im_end|>\\n<|im_start|>assistant\\nYes?<|im_end|>\\n<|im_start|>user\\ntext "
        )
        assert shown.startswith(f"{own.data}: the prompt '{before}")
        assert shown.endswith(tuple(f"<|im_start|>assistant\\n' has the answer '{a}<|im_end|>'." for a in "ab"))


@pytest.mark.parametrize(("answers", "end"), [(("red", "blue"), "</s>"), (("{i} is one", "{i} is two"), "\\n</s>")])
def test_the_first_lines_show_the_special_tokens_around_a_prompt_as_it_is_tuned(
    tmp_path: Path, answers: tuple[str, str], end: str
) -> None:
    checkpoint = save_worded_llama(tmp_path / "model", spm_tokenizer())
    own = read(tmp_path, [{"prompt": f"text {i}", "completion": answers[i % 2].format(i=i)} for i in range(150)])
    config = RunConfig(benchmarks=(own,), model=ModelConfig(source=str(checkpoint)))
    _, shown, *_ = rows_of(config)
    assert shown.startswith(f"{own.data}: the prompt '<s>text ")
    assert shown.endswith(f"{end}'.")
    _, shown, *_ = rows_of(RunConfig(benchmarks=(own,), model=ModelConfig(source="owner/name")))
    assert "<s>" not in shown
    assert shown.endswith(f"{end.removesuffix('</s>')}', without the model's special tokens.")


@pytest.mark.parametrize(("template", "ends"), [("lettered", ("A</s>'", "B</s>'")), ("harness", ("'", "'"))])
def test_the_first_lines_show_an_end_after_choices_of_each_row_if_it_is_tuned(
    tmp_path: Path, template: str, ends: tuple[str, str]
) -> None:
    checkpoint = save_worded_llama(tmp_path / "model", spm_tokenizer())
    rows = [{"question": f"text {i}", "choices": [f"a {i}", f"b {i}"], "answer": "AB"[i % 2]} for i in range(150)]
    settings = {"benchmarks": (read(tmp_path, rows),), "model": {"source": str(checkpoint)}}
    _, shown, *_ = rows_of(RunConfig(**settings, prompts={"template": template}))
    assert shown.removesuffix(".").endswith(ends)
    assert ("</s>" in shown) == (template == "lettered")


def test_labels_are_counted_by_rows(tmp_path: Path) -> None:
    own = read(tmp_path, labelled(300, 3))
    assert Counter(prompts(own).values()) == {"label 0": 100, "label 1": 100, "label 2": 100}
