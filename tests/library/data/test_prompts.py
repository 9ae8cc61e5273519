"""Prompts on hand-made examples: every template's literal text, the draws, the stage."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers import CHATML, load_and_render, read_benchmark, render_split, save_chatting_llama, write_jsonl
from tailored_llama.config import BenchmarkConfig
from tailored_llama.data import Example, Prompt, load_template, named_example, read_prompts, render, select_train
from tailored_llama.data.benchmarks import EXAMPLES_SCHEMA
from tailored_llama.data.builtin import SEVEN
from tailored_llama.data.chat import LAYOUT, find_chat, read_chat
from tailored_llama.data.drawing import select_evaluation
from tailored_llama.data.prompts import few_shot_header
from tailored_llama.data.templates import shipped
from tailored_llama.errors import InputError
from tailored_llama.store import read_table, write_table

BOOLQ = Example(3, {"passage": "Ice -- Ice is cold.", "question": "is ice cold"}, ("no", "yes"), 1)
PIQA = Example(0, {"question": "Cool a drink"}, ("Add ice.", "Add fire."), 0)
HELLASWAG = Example(0, {"query": "Skiing: A man"}, (" skis away.", "eats, then sleeps."), 0)
WINOGRANDE = Example(
    0,
    {"sentence": "Ann beat Bea since _ was fast.", "prefix": "Ann beat Bea since ", "suffix": "was fast."},
    ("Ann", "Bea"),
    1,
)
QUESTION = Example(0, {"question": "What is hot?"}, ("ice", "fire"), 1)
EXAMPLES = {
    "boolq": BOOLQ,
    "piqa": PIQA,
    "hellaswag": HELLASWAG,
    "winogrande": WINOGRANDE,
    "arc_easy": QUESTION,
    "arc_challenge": QUESTION,
    "openbookqa": QUESTION,
}
CONTEXTS = {
    ("boolq", "harness"): "Ice -- Ice is cold.\nQuestion: is ice cold?\nAnswer:",
    ("piqa", "harness"): "Question: Cool a drink\nAnswer:",
    ("hellaswag", "harness"): "Skiing: A man",
    ("arc_easy", "harness"): "Question: What is hot?\nAnswer:",
    ("arc_challenge", "harness"): "Question: What is hot?\nAnswer:",
    ("openbookqa", "harness"): "What is hot?",
    ("boolq", "task"): "Read the passage and answer the question with yes or no.\n\n"
    "Passage: Ice -- Ice is cold.\nQuestion: is ice cold?\nAnswer:",
    ("piqa", "task"): "Give the solution that reaches the goal in everyday life.\n\nGoal: Cool a drink\nSolution:",
    ("hellaswag", "task"): "Continue the text with what most plausibly happens next.\n\nText: Skiing: A man",
    ("winogrande", "task"): "Decide which of the two options fills the blank so that the sentence makes sense.\n\n"
    "Sentence: Ann beat Bea since _ was fast.\nQuestion: Does the blank _ stand for Ann or for Bea?\nAnswer:",
    ("arc_easy", "task"): "Answer this question from a grade-school science exam.\n\nQuestion: What is hot?\nAnswer:",
    ("arc_challenge", "task"): "Answer this difficult question from a grade-school science exam.\n\n"
    "Question: What is hot?\nAnswer:",
    ("openbookqa", "task"): "Answer the question with an elementary science fact and common sense.\n\n"
    "Question: What is hot?\nAnswer:",
    ("boolq", "reread"): "Read the passage and answer the question with yes or no.\n\nPassage: Ice -- Ice is cold.\n"
    "Question: is ice cold?\nRead the question again: is ice cold?\nAnswer:",
    ("piqa", "reread"): "Give the solution that reaches the goal in everyday life.\n\n"
    "Goal: Cool a drink\nRead the goal again: Cool a drink\nSolution:",
    ("hellaswag", "reread"): "Continue the text with what most plausibly happens next.\n\n"
    "Text: Skiing: A man\nRead the text again: Skiing: A man",
    ("winogrande", "reread"): "Decide which of the two options fills the blank so that the sentence makes sense.\n\n"
    "Sentence: Ann beat Bea since _ was fast.\nQuestion: Does the blank _ stand for Ann or for Bea?\n"
    "Read the sentence again: Ann beat Bea since _ was fast.\nAnswer:",
    ("arc_easy", "reread"): "Answer this question from a grade-school science exam.\n\n"
    "Question: What is hot?\nRead the question again: What is hot?\nAnswer:",
    ("arc_challenge", "reread"): "Answer this difficult question from a grade-school science exam.\n\n"
    "Question: What is hot?\nRead the question again: What is hot?\nAnswer:",
    ("openbookqa", "reread"): "Answer the question with an elementary science fact and common sense.\n\n"
    "Question: What is hot?\nRead the question again: What is hot?\nAnswer:",
}
TEMPLATES = {name: load_template(name) for name in shipped()}
MINE = BenchmarkConfig(name="mine", evaluation="e.csv", context="c", choices="o", answer="a")


def config(name: str) -> BenchmarkConfig:
    return BenchmarkConfig(name=name)


def examples(answers: str) -> list[Example]:
    return [Example(i, {"context": f"text {i}"}, ("a", "b", "c"), int(a)) for i, a in enumerate(answers)]


@pytest.mark.parametrize(("name", "template"), CONTEXTS)
def test_contexts_and_continuations(name: str, template: str) -> None:
    example = EXAMPLES[name]
    prompt = render(config(name), TEMPLATES[template], example)
    assert prompt.contexts == (CONTEXTS[name, template],) * 2
    assert prompt.continuations == tuple(f" {choice}" for choice in example.choices)
    assert (prompt.example, prompt.answer) == (example.index, example.answer)


def test_winogrande_harness_puts_the_choice_into_the_context() -> None:
    assert render(config("winogrande"), TEMPLATES["harness"], WINOGRANDE) == Prompt(
        example=0,
        contexts=("Ann beat Bea since Ann", "Ann beat Bea since Bea"),
        continuations=(" was fast.", " was fast."),
        answer=1,
        choice_lengths=(9, 9),
    )


def test_lengths_are_characters_without_the_delimiter() -> None:
    # A space that belongs to the choice counts, as in lm-evaluation-harness; bytes do not.
    assert render(config("hellaswag"), TEMPLATES["harness"], HELLASWAG).choice_lengths == (11, 18)
    accents = Example(0, {"question": "q"}, ("é", "日本"), 0)
    assert render(config("piqa"), TEMPLATES["harness"], accents).choice_lengths == (1, 2)


def test_braces_in_a_text_are_text() -> None:
    braces = Example(0, {"question": "What is {x}?"}, ("{}", "{0}"), 0)
    prompt = render(config("arc_easy"), TEMPLATES["harness"], braces)
    assert prompt.contexts[0] == "Question: What is {x}?\nAnswer:"
    assert prompt.continuations == (" {}", " {0}")


def test_own_benchmark() -> None:
    example = Example(0, {"context": "The sky is"}, ("green", "blue"), 1)
    assert render(MINE, TEMPLATES["harness"], example).contexts[0] == "The sky is"
    told = MINE.model_copy(update={"instruction": "Name the colour."})
    assert render(told, TEMPLATES["task"], example).contexts[0] == "Name the colour.\n\nThe sky is"
    assert render(told, TEMPLATES["reread"], example).contexts[0] == (
        "Name the colour.\n\nThe sky is\nRead the question again: The sky is"
    )
    assert render(MINE, TEMPLATES["task"], example).contexts[0] == "The sky is"


def test_configured_instruction_replaces_one_of_the_seven() -> None:
    benchmark = BenchmarkConfig(name="arc_easy", instruction="Think.")
    assert render(benchmark, TEMPLATES["task"], QUESTION).contexts[0] == "Think.\n\nQuestion: What is hot?\nAnswer:"


def test_listed_choices_and_the_letter_that_is_scored() -> None:
    own = MINE.model_copy(update={"instruction": "Name the colour."})
    example = Example(0, {"context": "The sky is"}, ("green", "blue", "{red}"), 1)
    prompt = render(own, TEMPLATES["lettered"], example)
    assert prompt.contexts == ("Name the colour.\n\nThe sky is\nA. green\nB. blue\nC. {red}\nAnswer:",) * 3
    assert prompt.continuations == (" A", " B", " C")
    assert prompt.choice_lengths == (1, 1, 1)  # acc_norm is acc
    header = few_shot_header(own, TEMPLATES["lettered"], [example])
    assert header == prompt.contexts[0] + " B\n\n"
    with pytest.raises(InputError) as caught:
        render(own, TEMPLATES["lettered"], Example(4, {"context": "c"}, tuple("0123456789" * 3), 0))
    assert str(caught.value) == "example 4: got 30 choices; allowed: at most 26, the letters of template lettered"


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("name", SEVEN)
def test_every_shipped_set_words_every_benchmark(name: str, template: str) -> None:
    benchmark, example = config(name), WINOGRANDE if name == "winogrande" else EXAMPLES[name]
    prompt = render(benchmark, TEMPLATES[template], example)
    pairs = set(zip(prompt.contexts, prompt.continuations, strict=True))
    assert len(pairs) == len(example.choices)
    for context, continuation in pairs:
        assert "{" not in context + continuation
        assert context == context.strip()
        assert continuation == " " + continuation.strip() or name == "hellaswag"  # a choice there starts with a space
    if template != "harness":
        assert len(set(prompt.contexts)) == 1


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("name", SEVEN)
def test_one_message_holds_all_that_differs_by_row_but_in_winogrande(name: str, template: str) -> None:
    examples = (named_example(config(name)), EXAMPLES[name])
    prompts = [render(config(name), TEMPLATES[template], example, "Solved.\n\n") for example in examples]
    named, *rows = ((prompt.contexts, prompt.continuations) for prompt in prompts)
    chat = find_chat(config(name), named, rows, False)
    assert (chat is None) == ((name, template) == ("winogrande", "harness"))
    if chat:
        assert not any(text in part for part in chat.parts for text in EXAMPLES[name].fields.values())


def test_the_generic_set_says_the_same_to_all() -> None:
    asked = {
        "boolq": "Ice -- Ice is cold.\nis ice cold?",
        "piqa": "Cool a drink",
        "hellaswag": "Skiing: A man",
        "winogrande": "Ann beat Bea since _ was fast.",
    }
    for name in SEVEN:
        # whatever the configuration says of the task: what is generic stays so
        benchmark = BenchmarkConfig(name=name, instruction="Think.")
        assert render(benchmark, TEMPLATES["generic"], EXAMPLES[name]).contexts[0] == (
            "Below is an input. Write a response that completes it suitably.\n\n"
            f"### Input:\n{asked.get(name, 'What is hot?')}\n\n### Response:"
        )


def test_few_shot_header_of_the_harness() -> None:
    assert few_shot_header(config("arc_easy"), TEMPLATES["harness"], []) == ""
    assert few_shot_header(config("arc_easy"), TEMPLATES["harness"], [QUESTION, QUESTION]) == (
        "Question: What is hot?\nAnswer: fire\n\n" * 2
    )
    shot = few_shot_header(config("winogrande"), TEMPLATES["harness"], [WINOGRANDE])
    assert shot == "Ann beat Bea since Bea was fast.\n\n"


@pytest.mark.parametrize("name", SEVEN)
def test_instruction_stands_once_with_shots(name: str) -> None:
    benchmark, example = config(name), EXAMPLES[name]
    alone = render(benchmark, TEMPLATES["task"], example)
    header = few_shot_header(benchmark, TEMPLATES["task"], [example])
    assert header == alone.contexts[example.answer] + alone.continuations[example.answer] + "\n\n"
    instruction, blank, question = alone.contexts[0].partition("\n\n")
    with_shot = render(benchmark, TEMPLATES["task"], example, header).contexts[0]
    assert with_shot == header + question
    assert with_shot.count(instruction + blank) == 1


def test_train_draw_is_balanced_disjoint_and_repeatable() -> None:
    pool = examples("0" * 50 + "1" * 30 + "2" * 4)
    shots, held_out = select_train(pool, 20, 10, seed=1, benchmark="mine")
    assert Counter(e.answer for e in shots) == {0: 8, 1: 8, 2: 4}
    assert Counter(e.answer for e in held_out) == {0: 5, 1: 5}
    assert not {e.index for e in shots} & {e.index for e in held_out}
    assert len({e.index for e in shots + held_out}) == 30
    assert (shots, held_out) == select_train(pool, 20, 10, seed=1, benchmark="mine")
    assert shots == select_train(pool, 20, 0, seed=1, benchmark="mine")[0]
    assert shots != select_train(pool, 20, 10, seed=2, benchmark="mine")[0]
    assert [e.answer for e in shots] != sorted(e.answer for e in shots)


def test_train_draw_counts_differ_by_one_at_most() -> None:
    for seed in range(5):
        shots, held_out = select_train(examples("012" * 30), 50, 25, seed, benchmark="mine")
        assert sorted(Counter(e.answer for e in shots).values()) == [16, 17, 17]
        assert sorted(Counter(e.answer for e in held_out).values()) == [8, 8, 9]


def test_whole_train_split_can_be_drawn() -> None:
    shots, held_out = select_train(examples("0121"), 3, 1, 0, benchmark="mine")
    assert {e.index for e in shots + held_out} == {0, 1, 2, 3}


def test_too_many_train_examples_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        select_train(examples("012" * 30), 41, 50, 0, benchmark="mine")
    assert str(caught.value) == (
        "tuning.shots: got 41, beside 50 to hold out (tuning.held_out); allowed: at most 90 together, the train "
        "examples of mine to draw from"
    )


def test_evaluation_is_evenly_spaced() -> None:
    pool = examples("0" * 10)
    assert [e.index for e in select_evaluation(pool, 4)] == [0, 2, 5, 7]
    assert [e.index for e in select_evaluation(pool, 1)] == [0]
    assert select_evaluation(pool, None) == select_evaluation(pool, 10) == select_evaluation(pool, 99) == pool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train = [Example(i, {"question": f"train {i}?"}, ("no", "yes"), i % 2) for i in range(12)]
    selection = [Example(i, {"question": f"train {i}?"}, ("no", "yes"), i % 2) for i in range(12, 17)]
    evaluation = [Example(i, {"question": f"eval {i}?"}, ("no", "yes"), i % 2) for i in range(6)]
    parts = {"train": train, "selection": selection, "evaluation": evaluation}
    both = [(split, example) for split, own in parts.items() for example in own]
    columns = {
        "split": [s for s, _ in both],
        "example": [e.index for _, e in both],
        "fields": [list(e.fields.items()) for _, e in both],
        "choices": [e.choices for _, e in both],
        "answer": [e.answer for _, e in both],
    }
    (tmp_path / "examples").mkdir()
    write_table(tmp_path / "examples" / "examples.parquet", columns, EXAMPLES_SCHEMA)
    return tmp_path


def test_stage_renders_evaluation(folder: Path) -> None:
    assert render_split(folder / "examples", folder, config("arc_easy"), count=3) == {"evaluation": 3}
    prompts = read_prompts(folder, "evaluation")
    assert [p.example for p in prompts] == [0, 2, 4]
    assert prompts[1] == Prompt(2, ("Question: eval 2?\nAnswer:",) * 2, (" no", " yes"), 0, (2, 3), is_ended=True)
    assert read_prompts(folder, "shots") == []


def test_choices_that_differ_by_row_are_not_ended_whatever_part_of_them_is_drawn(folder: Path) -> None:
    """One shot shows one set of choices. Tuning, scoring and serving must not decide by their own rows."""
    file = folder / "examples" / "examples.parquet"
    rows = read_table(file, EXAMPLES_SCHEMA).to_pydict()
    alike, differ = rows["choices"], [[f"not {i}", f"{i}"] for i in range(len(rows["choices"]))]
    for choices, is_ended in ((alike, True), (differ, False)):
        write_table(file, {**rows, "choices": choices}, EXAMPLES_SCHEMA)
        for split, options in (("train", {"shots": 1, "held_out": 1}), ("evaluation", {"count": 1})):
            render_split(folder / "examples", folder, config("arc_easy"), split, **options)
            drawn = [p for kind in ("shots", "held_out", "evaluation") for p in read_prompts(folder, kind)]
            assert drawn
            assert {p.is_ended for p in drawn} == {is_ended}
            chat = read_chat(folder)
            assert chat is not None
            assert bool(chat.answers) == is_ended


def test_stage_renders_shots_and_held_out_apart_from_the_solved_ones(folder: Path) -> None:
    place = folder / "examples", folder, config("arc_easy")
    options = {"template": "task", "num_fewshot": 2, "seed": 5}
    found = render_split(*place, "train", shots=6, held_out=4, **options)
    assert found == {"shots": 6, "held_out": 4}
    shots, held_out = read_prompts(folder, "shots"), read_prompts(folder, "held_out")
    assert not {p.example for p in shots} & {p.example for p in held_out}
    header = {p.contexts[0].rpartition("Question: ")[0] for p in shots + held_out}
    assert len(header) == 1
    assert not any(f"train {p.example}?\nAnswer: " in header.copy().pop() for p in shots + held_out)
    render_split(*place, **options)
    assert {p.contexts[0].rpartition("Question: ")[0] for p in read_prompts(folder, "evaluation")} == header


def test_a_slice_to_choose_on_is_apart_from_all_that_is_tuned_on_or_solved(folder: Path) -> None:
    place = folder / "examples", folder, config("arc_easy")
    options = {"num_fewshot": 2, "seed": 5}
    render_split(*place, "train", shots=6, held_out=4, **options)
    tuned = {p.example for split in ("shots", "held_out") for p in read_prompts(folder, split)}
    assert render_split(*place, "selection", "task", count=5, **options) == {"selection": 5}
    slice_ = read_prompts(folder, "selection")
    asked = {p.example for p in slice_}
    assert len(asked) == 5
    assert not asked & tuned
    header = slice_[0].contexts[0].rpartition("Question: ")[0]
    assert not any(f"train {example}?" in header for example in asked | tuned)
    render_split(*place, "selection", count=5, **options)
    again = read_prompts(folder, "selection")
    assert [p.example for p in again] == [p.example for p in slice_]  # the same for all sets
    with pytest.raises(
        InputError, match=r"^examples: got 6; allowed: at most 5 \(arc_easy has so many to choose with\)"
    ):
        render_split(*place, "selection", count=6, **options)


def test_stage_refuses_more_solved_examples_than_there_are(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        render_split(folder / "examples", folder, config("arc_easy"), num_fewshot=13)
    assert str(caught.value) == (
        "scoring.num_fewshot: got 13; allowed: at most 12 (examples in the train split of arc_easy)"
    )
    assert not (folder / "prompts.parquet").exists()


def messages(folder: Path, turns: int, **fields: Any) -> BenchmarkConfig:
    pair = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    asked = [[*pair * (turns - 1), {"role": "user", "content": f"text {i}"}, pair[1]] for i in range(150)]
    file = write_jsonl(folder / "job.jsonl", [{"messages": turns} for turns in asked])
    return read_benchmark(**{"data": file, "kind": "written", **fields})


def test_a_base_without_chat_template_asks_one_message_by_a_layout(tmp_path: Path, tiny: Path) -> None:
    asked = messages(tmp_path, 1)
    tailored = save_chatting_llama(tmp_path / "shipped", template=LAYOUT + "{{ messages[-1]['content'] }}")
    alone, of_base = load_and_render(asked, tmp_path / "alone"), load_and_render(asked, tmp_path / "base", dense=tiny)
    again = load_and_render(asked, tmp_path / "again", dense=tailored)  # as a proof is repeated
    for file in ("prompts.parquet", "chat.json"):
        assert (alone / file).read_bytes() == (of_base / file).read_bytes() == (again / file).read_bytes()
    first = read_prompts(of_base, "evaluation")[0]
    assert first == Prompt(first.example, (f"text {first.example}",), (" yes",), 0, (3,), is_ended=True)
    with pytest.raises(InputError) as caught:
        load_and_render(messages(tmp_path, 2), tmp_path / "two", dense=tiny)
    assert re.fullmatch(
        r"job example \d+: got 3 messages before the answer; allowed: one of the user \(and a system message\), as the "
        "base model has no chat template",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("template", "fields", "changes", "message"),
    [
        (
            CHATML,
            {},
            {"num_fewshot": 1},
            "scoring.num_fewshot: got 1 with job; allowed: 0 for rows that the base's chat",
        ),
        (
            "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + CHATML,
            {"instruction": "Be good."},
            {},
            "benchmarks.job: got 'no system' from the chat template; allowed: messages that the base's chat",
        ),
        (
            "{{ raise_exception('too long') if messages | length > 2 }}" + CHATML,
            {},
            {},
            r"job example \d+: got 'too long' from the chat template; allowed: messages that the base's chat",
        ),
    ],
)
def test_what_a_chat_template_cannot_ask_is_one_line(
    tmp_path: Path, template: str, fields: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    base = save_chatting_llama(tmp_path / "base", template=template)
    with pytest.raises(InputError) as caught:
        load_and_render(messages(tmp_path, 2, **fields), tmp_path / "rendered", dense=base, **changes)
    assert re.match(message, str(caught.value))
    assert "\n" not in str(caught.value)
