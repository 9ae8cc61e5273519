"""The harness template against lm-evaluation-harness 0.4.13 itself, on the official splits.

Verified here, with nothing left out:
- every context, continuation, right answer and acc_norm length of the whole evaluation splits: BoolQ 3,270,
  PIQA 1,838, HellaSwag 10,042, WinoGrande 1,267, ARC-easy test 2,376, ARC-challenge test 1,172, OpenBookQA test 500.
  (WinoGrande has no acc_norm in lm-eval; its length is that of the scored rest of the sentence.)
- two-shot prompts (sampler first_n) of 100 evaluation documents of each of the seven;
- the wheel's documents against the data sets' own rows, on the validation splits of those rebuilt from documents;
- rows of the train splits (BoolQ 9,427, PIQA 16,113, HellaSwag 39,905, WinoGrande 40,398, ARC-easy 2,251,
  ARC-challenge 1,119, OpenBookQA 4,957) and how many of them stay once evaluated and repeated ones are left out;
- 720 of BoolQ's 7,929 train passages are also validation passages.
"""

import re
from pathlib import Path
from typing import Any

import pytest

import harness
from harness import DOWNLOADS, raw_validation, requests, stock_task, train_rows, wheel_documents
from tailored_llama.config import BenchmarkConfig, Work
from tailored_llama.data import BUILTIN, BenchmarkSource, Example, load_benchmark, load_template, render
from tailored_llama.data.benchmarks import benchmark_texts, read_examples
from tailored_llama.data.builtin import SEVEN
from tailored_llama.data.prompts import few_shot_header

pytestmark = pytest.mark.real

HARNESS = load_template("harness")

EVALUATION = {
    "boolq": 3270,
    "piqa": 1838,
    "hellaswag": 10042,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
}
TRAIN = {  # rows, and what stays
    "boolq": (9427, 9427),
    "piqa": (16113, 16105),
    "hellaswag": (39905, 39905),
    "winogrande": (40398, 40394),
    "arc_easy": (2251, 2248),
    "arc_challenge": (1119, 1118),
    "openbookqa": (4957, 4901),
}


def harness_answer(task: Any, document: dict[str, Any]) -> Any:
    return task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)


@pytest.mark.parametrize("name", SEVEN)
def test_harness_prompts_equal_lm_eval_on_the_whole_evaluation_split(name: str) -> None:
    benchmark = BenchmarkConfig(name=name)
    task = stock_task(name, train_rows(name)[:2])
    documents = list(task.eval_docs)
    examples = harness.examples(name, "evaluation")
    assert len(documents) == len(examples) == EVALUATION[name]
    for document, example in zip(documents, examples, strict=True):
        prompt = render(benchmark, HARNESS, example)
        asked = requests(task, document)
        assert list(zip(prompt.contexts, prompt.continuations, strict=True)) == asked
        assert prompt.answer == harness_answer(task, document)
        if name == "winogrande":
            assert prompt.choice_lengths == tuple(len(continuation) - 1 for _, continuation in asked)
        else:
            assert prompt.choice_lengths == tuple(len(choice) for choice in task.doc_to_choice(document))
    reported = set(task.aggregation())
    assert reported == ({"acc"} if name in ("boolq", "winogrande") else {"acc", "acc_norm"})


@pytest.mark.parametrize("name", SEVEN)
def test_two_shot_prompts_equal_lm_eval_with_first_n(name: str) -> None:
    benchmark = BenchmarkConfig(name=name)
    task = stock_task(name, train_rows(name)[:2], num_fewshot=2)
    evaluation = harness.examples(name, "evaluation")
    shots = (evaluation if name == "hellaswag" else harness.examples(name, "train"))[:2]
    assert [shot.index for shot in shots] == [0, 1]
    header = few_shot_header(benchmark, HARNESS, shots)
    for document, example in list(zip(task.eval_docs, evaluation, strict=True))[2:102]:
        prompt = render(benchmark, HARNESS, example, header)
        assert prompt.contexts[0].startswith(header)
        assert list(zip(prompt.contexts, prompt.continuations, strict=True)) == requests(task, document, 2)


@pytest.mark.parametrize("name", ["boolq", "arc_easy", "arc_challenge", "openbookqa"])
def test_documents_of_the_wheel_say_what_the_data_set_says(name: str) -> None:
    for row, document in zip(raw_validation(name), wheel_documents(name, "val"), strict=True):
        fields, choices, answer = BUILTIN[name].from_wheel(document)
        if name == "boolq":  # google/boolq lacks the titles that SuperGLUE (and the wheel) put before each passage
            assert fields["passage"].endswith(row["passage"])
            assert (fields["question"], choices[answer]) == (row["question"], "yes" if row["answer"] else "no")
        else:
            question = row["question_stem" if name == "openbookqa" else "question"]
            labels = row["choices"]["label"]
            assert (fields["question"], [*choices]) == (question, row["choices"]["text"])
            assert labels[answer] == row["answerKey"]


def test_hellaswag_train_text_parts_from_the_evaluation_text_by_stops_and_spaces_only() -> None:
    """The wheel's rule against lm-eval's, on the validation split: 3,073 of 10,042 documents part."""
    official = harness.examples("hellaswag", "evaluation")
    convert = BUILTIN["hellaswag"].from_wheel
    wheel = [Example(i, *convert(document)) for i, document in enumerate(wheel_documents("hellaswag", "val"))]
    parted = [(h, w) for h, w in zip(official, wheel, strict=True) if h != w]
    assert len(parted) == 3073
    for h, w in parted:
        assert h.answer == w.answer
        for ours, theirs in zip([*h.fields.values(), *h.choices], [*w.fields.values(), *w.choices], strict=True):
            assert re.sub(r"[. ]+", " ", ours).strip() == re.sub(r"[. ]+", " ", theirs).strip()


@pytest.mark.parametrize("name", SEVEN)
def test_train_rows_and_what_stays(name: str, tmp_path: Path) -> None:
    benchmark = BenchmarkConfig(name=name)
    rows, kept = TRAIN[name]
    counts = load_benchmark(settings=BenchmarkSource(benchmark), work=Work(tmp_path, downloads=DOWNLOADS))
    assert counts == {"train": kept, "evaluation": EVALUATION[name], "left_out": rows - kept}
    train, evaluation = read_examples(tmp_path, "train"), read_examples(tmp_path, "evaluation")
    assert (len(train), len(evaluation)) == (kept, EVALUATION[name])
    assert all(0 <= e.answer < len(e.choices) for e in train + evaluation)
    assert all(e.index < rows for e in train)
    texts = [(*e.fields.values(), *sorted(e.choices)) for e in train]
    assert len(set(texts)) == kept
    assert not set(texts) & {(*e.fields.values(), *sorted(e.choices)) for e in evaluation}


def test_boolq_calibration_and_perplexity_passages_are_apart() -> None:
    boolq = BenchmarkConfig(name="boolq")
    train = benchmark_texts(boolq, "train", "passage", DOWNLOADS)
    validation = benchmark_texts(boolq, "validation", "passage", DOWNLOADS)
    assert (len(train), len(validation)) == (7929 - 720, 2939)
    assert not set(train) & set(validation)
