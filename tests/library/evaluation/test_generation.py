"""Written answers: what is generated, where it stops, and how it is judged."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from helpers import CPU, load_and_render, read_benchmark, save_chatting_llama, save_worded_llama, tune, write_jsonl
from tailored_llama.config import WRITTEN, BenchmarkConfig, Metric, Work, new_tokens, validate_config
from tailored_llama.data import (
    UNLABELLED,
    AnswersSettings,
    BenchmarkSource,
    Example,
    Prompt,
    PromptSettings,
    check_answers,
    check_benchmark,
    load_benchmark,
    read_prompts,
    render_prompts,
)
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.errors import InputError
from tailored_llama.evaluation import ScoreSettings, WrittenAnswer, score_benchmark
from tailored_llama.evaluation.generation import generate
from tailored_llama.evaluation.scores import read_answers
from tailored_llama.evaluation.written import (
    METRICS,
    answers_schema,
    exact_match,
    f1,
    normalise,
    same_call,
    written_floor,
)
from tailored_llama.models import load_model, load_tokenizer
from tailored_llama.store import read_table

CONTEXTS = ["The sky is", "x", "Question: what is it that a very long question asks?\nAnswer:", "Two words"]


def plain(model: Any, tokenizer: Any, context: str, count: int) -> str:
    """Greedy decoding by hand: one whole forward pass for every token."""
    ids = tokenizer.encode(context)
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.mark.parametrize("batch_tokens", [64, 4096], ids=["many batches", "one batch"])
def test_batches_write_what_each_context_gets_alone(tiny: Path, batch_tokens: int) -> None:
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    expected = [plain(model, tokenizer, context, 12) for context in CONTEXTS]
    assert generate(model, tokenizer, CONTEXTS, WrittenAnswer(12), batch_tokens=batch_tokens) == expected


def test_the_head_never_multiplies_a_slice_which_is_slow_in_bfloat16(tiny: Path) -> None:
    model, seen = load_model(tiny), list[bool]()
    multiply = model.lm_head.forward
    model.lm_head.forward = lambda states: (seen.append(states.is_contiguous()), multiply(states))[1]
    generate(model, load_tokenizer(tiny), CONTEXTS, WrittenAnswer(3))
    assert len(seen) == 3  # tokens of one batch
    assert all(seen)


def test_an_answer_ends_before_the_first_stop_string(tiny: Path) -> None:
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    whole = plain(model, tokenizer, "The sky is", 24)
    first, second = [i for i in range(1, len(whole)) if whole[i].isascii() and whole[i] not in whole[:i]][:2]
    stop = [whole[second], whole[first]]
    assert generate(model, tokenizer, ["The sky is"], WrittenAnswer(24, stop)) == [whole[:first]]
    steps: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    generate(model, tokenizer, ["The sky is"], WrittenAnswer(24, stop))
    assert len(steps) < 24  # and nothing is computed after it


def test_a_stop_string_that_the_prompt_ends_with_stops_nothing(tiny: Path) -> None:
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    whole = plain(model, tokenizer, "The sky is", 12)
    assert generate(model, tokenizer, ["The sky is"], WrittenAnswer(12, ["is" + whole[0], "sky"])) == [whole]


def test_padding_counts(tiny: Path) -> None:
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    shapes: list[tuple[int, ...]] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    generate(model, tokenizer, ["x" * 100, *["y" * 4] * 30], WrittenAnswer(4), batch_tokens=208)
    first = [shape for shape in shapes if shape[1] > 1]
    assert first == [(2, 100), (26, 4), (3, 4)]  # 2 × 104, then 26 × 8


def test_a_long_context_loses_its_start_and_leaves_room(tiny: Path) -> None:
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    long = "abc" * 100
    assert generate(model, tokenizer, [long], WrittenAnswer(6)) == [plain(model, tokenizer, long[-250:], 6)]
    with pytest.raises(InputError, match=r"max_new_tokens: got 256, .* allowed: less than 256, "):
        generate(model, tokenizer, ["x"], WrittenAnswer(256))


def test_an_answer_that_may_fill_the_context_is_refused_before_heavy_work(
    tiny: Path, folder: Callable[[str], Path]
) -> None:
    rows = [{"prompt": f"text {i}", "completion": "7" * 250 if i == 149 else f"answer {i}"} for i in range(150)]
    own = read_benchmark(data=write_jsonl(folder("data") / "rows.jsonl", rows))
    prompts = load_and_render(own, folder("rendered"))
    with pytest.raises(InputError) as refused:
        check_answers(dense=tiny, prompts=prompts, settings=AnswersSettings(new_tokens(own)), work=Work(folder("out")))
    assert str(refused.value) == (
        "max_new_tokens: got 258, as set or as the longest answer may take; allowed: less than 256, the model's context"
    )


def test_normal_form_and_metrics_by_hand() -> None:
    assert normalise("  The  U.S. of\nAn America! ") == "us of america"
    assert exact_match(" the Eiffel tower.", ["Big Ben", "Eiffel Tower"]) == 1
    assert exact_match("Eiffel", ["Eiffel Tower"]) == 0
    assert f1("tower of Eiffel", ["Big Ben", "Eiffel Tower"]) == pytest.approx(2 * 2 / (3 + 2))
    assert f1("ben ben", ["Big Ben"]) == pytest.approx(2 * 1 / (2 + 2))  # a word counts as often as it is wanted
    assert (f1("the", ["a"]), f1("", ["x"]), f1("x", ["the"])) == (1, 0, 0)


@pytest.mark.parametrize(
    ("text", "valid", "equal", "right"),
    [
        (' {"b": [1.0, {"c": "x"}],\n"a": true} ', 1, 1, 1),
        ('{"a": true, "b": [1, {"c": "y"}]}', 1, 2 / 3, 0),
        ('{"a": 1, "b": [1, {"c": "x"}]}', 1, 2 / 3, 0),  # true is not 1
        ('{"a": true, "b": [1, {"c": "x"}], "d": null}', 1, 3 / 4, 0),
        ('{"a": true}', 1, 1 / 3, 0),
        ('{"a": true, "b": [1, {"c": "x"}]} and more', 0, 0, 0),
        ('{"a": NaN}', 0, 0, 0),
        ("[" * 5000, 0, 0, 0),
        ("", 0, 0, 0),
        ('{"z": 2}', 1, 1, 1),
        ("{}", 1, 0, 0),
    ],
)
def test_json_is_right_if_all_fields_are(text: str, valid: int, equal: float, right: int) -> None:
    accepted = ['{"a": true, "b": [1, {"c": "x"}]}', '{"z": 2.0}']
    values = METRICS["json"](None).values
    figures = {name: value(text, accepted) for name, value in values.items()}
    assert figures == pytest.approx({"json": right, "valid_json": valid, "equal_fields": equal})


def call(name: str, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (call("area", base=10, unit="cm"), 1),
        (call("area", unit="m", base=10.0), 1),  # the values of two accepted calls
        (call("area", base=10), 1),  # one of them has no unit
        (call("area", base=11, unit="cm"), 0),
        (call("area", unit="cm"), 0),
        (call("area", base=10, height=5), 0),
        (call("size", base=10), 0),
        (call("volume", base=3), 1),
        (call("volume", base=10), 0),  # a value of another tool
        ('{"name": "area"}', 0),
        (f"[{call('area', base=10)}, {call('area', base=10)}]", 0),
        ("area(base=10)", 0),
        ("[]", 0),
    ],
)
def test_a_call_is_right_if_its_name_and_all_arguments_are(text: str, right: int) -> None:
    area = [call("area", base=10, **unit) for unit in ({"unit": "cm"}, {"unit": "m"}, {})]
    assert same_call(text, [*area, call("volume", base=3)]) == right


def test_a_list_of_calls_is_right_if_each_is() -> None:
    one, two = call("f", a=1), call("g", b=2)
    assert same_call(f"[{one}, {two}]", [f"[{one}, {two}]"]) == 1
    assert same_call(f"[{two}, {one}]", [f"[{one}, {two}]"]) == 0
    assert same_call(one, [f"[{one}, {two}]"]) == 0


def test_the_floor_of_json_is_always_writing_the_answer_that_is_most_often_right() -> None:
    def prompt(*accepted: str) -> Prompt:
        return Prompt(0, ("q",) * len(accepted), accepted, 0, tuple(map(len, accepted)))

    asked = [prompt('{"a": 1, "b": 2}'), prompt('{"b": 2, "a": 1.0}'), prompt('{"a": 3}'), prompt('{"a": 4}')]
    assert written_floor(asked, "json") == 0.5
    asked = [prompt(call("f", a=1), call("f", a=2)), prompt(call("f", a=2)), prompt(call("f", a=1)), prompt("x")]
    assert written_floor(asked, "tool_call") == 0.5
    unlabelled = [replace(prompt("?"), answer=UNLABELLED)] * 9  # what stands there is no answer
    assert written_floor(asked + unlabelled, "tool_call") == 0.5
    assert written_floor(unlabelled, "tool_call") == 0


def test_the_floor_is_always_writing_the_commonest_accepted_text() -> None:
    def prompt(*accepted: str) -> Prompt:
        return Prompt(0, ("q",) * len(accepted), accepted, 0, (0,) * len(accepted))

    asked = [prompt(" Yes", " yes."), prompt(" no"), prompt(" maybe", " YES"), prompt(" the no")]
    assert written_floor(asked, "exact_match") == written_floor(asked, "f1") == 0.5
    cars = [prompt(" red car"), prompt(" blue car"), prompt(" green car"), prompt(" car")]
    assert written_floor(cars, "exact_match") == 0.25
    assert written_floor(cars, "f1") == pytest.approx((3 * 2 / 3 + 1) / 4)  # always "car"


def test_a_metric_of_written_answers_has_a_floor_of_its_own() -> None:
    assert METRICS.keys() == WRITTEN.keys() == set(get_args(Metric)) - {"acc", "acc_norm"}
    assert all(name in metric(None).values for name, metric in METRICS.items())
    with pytest.raises(KeyError, match="bleu"):
        written_floor([Prompt(0, ("q",), (" no",), 0, (3,))], "bleu")


ROWS = [
    {
        "passage": "Ann is six.",
        "question": "How old is Ann?",
        "answers": {"text": ["six", "6"], "answer_start": [7, 7]},
    },
    {"passage": "Bob is two.", "question": "How old is Bob?", "answers": ["two"]},
    {"passage": "Eve is ten.", "question": "How old is Eve?", "answers": '["ten", "10"]'},
    {"passage": "Tim is not.", "question": "How old is Tim?", "answers": "[unknown]"},
]


def written(folder: Path, **changes: Any) -> BenchmarkConfig:
    settings = {
        "name": "ages",
        "train": write_jsonl(folder / "train.jsonl", [row | {"passage": row["passage"] + "!"} for row in ROWS]),
        "evaluation": write_jsonl(folder / "evaluation.jsonl", ROWS),
        "context": "{passage}\nQuestion: {question}\nAnswer:",
        "answer": "answers",
        "metric": "f1",
        "max_new_tokens": 6,
        "stop": ["\n", "."],
    }
    return BenchmarkConfig(**(settings | changes))


def test_a_benchmark_of_ones_own_with_written_answers(tmp_path: Path) -> None:
    examples = load_examples(written(tmp_path), "evaluation", "")
    assert examples[0] == Example(0, {"context": "Ann is six.\nQuestion: How old is Ann?\nAnswer:"}, ("six", "6"), 0)
    assert [example.choices for example in examples[1:]] == [("two",), ("ten", "10"), ("[unknown]",)]


def test_the_model_learns_where_to_stop_and_is_judged_without(tmp_path: Path) -> None:
    benchmark = written(tmp_path)
    run = validate_config({"tuning": {"shots": 2, "held_out": 1}, "scoring": {"num_fewshot": 1}})
    examples, train, evaluation = (tmp_path / name for name in ("examples", "train", "evaluation"))
    for one in (examples, train, evaluation):
        one.mkdir()
    load_benchmark(settings=BenchmarkSource(benchmark), work=Work(examples))
    render_prompts(examples, settings=PromptSettings.of(run, benchmark, "train"), work=Work(train))
    render_prompts(examples, settings=PromptSettings.of(run, benchmark, "evaluation"), work=Work(evaluation))
    (shot, _), (first, *_) = read_prompts(train, "shots"), read_prompts(evaluation, "evaluation")
    assert all(continuation.endswith("\n") for continuation in shot.continuations)
    assert first.continuations == (" six", " 6")
    assert first.contexts[0].count("Question:") == 2


def test_a_tuned_model_ends_its_answer_itself(folder: Callable[[str], Path]) -> None:
    checkpoint = save_worded_llama(folder("model"))
    examples, prompts, adapter = folder("examples"), folder("prompts"), folder("adapter")
    run = validate_config({"tuning": {"shots": 4, "held_out": 0, "epochs": 30, "learning_rate": 0.02}})
    benchmark = written(folder("data"), stop=None)
    load_benchmark(settings=BenchmarkSource(benchmark), work=Work(examples))
    render_prompts(examples, settings=PromptSettings.of(run, benchmark, "train"), work=Work(prompts))
    tune(checkpoint, prompts, run.tuning, adapter, metric="exact_match")
    contexts = [prompt.contexts[0] for prompt in read_prompts(prompts, "shots")]
    texts = generate(load_model(checkpoint, adapter), load_tokenizer(checkpoint), contexts, WrittenAnswer(32))
    assert sorted(texts) == [" [unknown]\n", " six\n", " ten\n", " two\n"]


def test_a_tuned_chat_ends_its_answer_with_the_end_of_its_turn(folder: Callable[[str], Path]) -> None:
    checkpoint, train = save_chatting_llama(folder("model")), folder("train")
    prompts, adapter, scores = folder("prompts"), folder("adapter"), folder("scores")
    earlier = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
    asked = [(f"How many is {i}?", f"{i % 2}\n\nor {i}") for i in range(150)]
    rows = [
        {"messages": [*earlier, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in asked
    ]
    benchmark = read_benchmark(data=write_jsonl(train / "rows.jsonl", rows), kind="written")
    run = validate_config({"tuning": {"shots": 2, "held_out": 0, "epochs": 40, "learning_rate": 0.02}})
    load_benchmark(settings=BenchmarkSource(benchmark), work=Work(train))
    render_prompts(train, checkpoint, settings=PromptSettings.of(run, benchmark, "train"), work=Work(prompts))
    tune(checkpoint, prompts, run.tuning, adapter, metric="exact_match")
    settings = replace(ScoreSettings.of(benchmark, "shots"), written=WrittenAnswer(32))
    score_benchmark(checkpoint, adapter, prompts, settings=settings, work=Work(scores, CPU))
    written = read_table(scores / "answers.parquet", answers_schema("exact_match")).to_pylist()
    assert [row["text"] for row in written] == [asked[row["example"]][1] for row in written]
    assert len(written) == 2


def test_the_stage_writes_answers_and_metrics(tiny: Path, folder: Callable[[str], Path]) -> None:
    benchmark, out = written(folder("data")), folder("out")
    prompts = load_and_render(benchmark, folder("rendered"))
    score_benchmark(tiny, None, prompts, settings=ScoreSettings.of(benchmark), work=Work(out, CPU))
    rows = read_table(out / "answers.parquet", answers_schema("f1")).to_pylist()
    contexts = [prompt.contexts[0] for prompt in read_prompts(prompts, "evaluation")]
    texts = generate(load_model(tiny), load_tokenizer(tiny), contexts, WrittenAnswer(6, ["\n", "."]))
    assert [row["text"] for row in rows] == [text.strip() for text in texts]
    assert rows[0]["accepted"] == ["six", "6"]
    result = json.loads((out / "metrics.json").read_text())
    assert (result["metric"], result["examples"], result["floor"]) == ("f1", 4, 0.25)
    assert result["f1"] == pytest.approx(read_answers(out, "f1").values.mean())
    assert {"exact_match", "exact_match_stderr", "f1_stderr"} <= result.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": "options"}, ".choices: got 'options'; allowed: only with metric acc or acc_norm"),
        (
            {"metric": "acc", "choices": "options"},
            ".max_new_tokens: got 6; allowed: only with metric exact_match, f1, json, tool_call",
        ),
        ({"context": "{passage"}, ".context: got '{passage', expected '}' before end of string; allowed: {column}"),
        ({"context": "{text} {question}"}, ": evaluation.jsonl: no column 'text'; present: passage, question, answers"),
        ({"answer": "answer"}, ": evaluation.jsonl: no column 'answer'; present: passage, question, answers"),
        (
            {"name": "boolq", **dict.fromkeys(("train", "evaluation", "context", "answer"))},
            ".metric: got 'f1'; allowed: acc or acc_norm, as it has choices",
        ),
    ],
)
def test_one_line_says_what_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_examples(written(tmp_path, **changes), "evaluation", "")
    assert str(caught.value) == f"benchmarks.{changes.get('name', 'ages')}{message}"


def test_an_answer_that_is_no_text_is_refused(tmp_path: Path) -> None:
    rows = [*ROWS[:1], ROWS[1] | {"answers": [7]}]
    benchmark = written(tmp_path, evaluation=write_jsonl(tmp_path / "bad.jsonl", rows))
    check_benchmark(benchmark)
    with pytest.raises(InputError, match=r"bad\.jsonl row 1: column answers: got \[7\]; allowed: a text, or a list of"):
        load_examples(benchmark, "evaluation", "")
