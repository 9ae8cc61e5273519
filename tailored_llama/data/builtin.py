"""The benchmarks of the embedded wheel: where their splits are, and how a row becomes an example."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tailored_llama.config import Metric

Parts = tuple[dict[str, str], tuple[str, ...], int]  # fields, choices, answer (-1: no such choice)


@dataclass(frozen=True)
class BuiltinBenchmark:
    """One of the seven: where its splits are, its headline metric, and how a row becomes an example."""

    columns: tuple[str, ...]  # of the Hub data set; the answer's column last
    from_wheel: Callable[[Mapping[str, Any]], Parts]
    from_hub: Callable[[Mapping[str, Any]], Parts]
    fields: tuple[str, ...] = ("question",)  # the named texts of an example
    evaluation: Literal["validation", "test"] = "validation"  # the split lm-evaluation-harness scores
    metric: Metric = "acc_norm"


def integer(value: Any) -> int:
    """A non-negative label as written in JSON, Parquet or CSV; -1 for anything else."""
    if isinstance(value, float):  # pandas turns an integer column with a gap into floats
        return int(value) if value.is_integer() else -1
    return int(value) if re.fullmatch(r"\d{1,9}", str(value).strip()) else -1


def _question(document: Mapping[str, Any]) -> Parts:
    text = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"question": text}, tuple(document["choices"]), document["gold"]


def _as_it_is(field: str) -> Callable[[Mapping[str, Any]], Parts]:
    """A converter for documents whose query is the only field."""
    return lambda document: ({field: document["query"]}, tuple(document["choices"]), document["gold"])


def _boolq_wheel(document: Mapping[str, Any]) -> Parts:
    passage, _, question = document["query"].rpartition("\nQuestion: ")
    fields = {"passage": passage, "question": question.removesuffix("?\nAnswer:")}
    return fields, ("no", "yes"), ("no", "yes").index(document["choices"][document["gold"]])


def _boolq_hub(row: Mapping[str, Any]) -> Parts:
    # aps/super_glue (the harness's source, titles in the passages) has `label`; google/boolq (no titles) has `answer`.
    answer = str(row["label"] if "label" in row else row["answer"]).lower()
    fields = {"passage": row["passage"], "question": row["question"]}
    return fields, ("no", "yes"), {"0": 0, "false": 0, "1": 1, "true": 1}.get(answer, -1)


def _piqa(row: Mapping[str, Any]) -> Parts:
    return {"question": row["goal"]}, (row["sol1"], row["sol2"]), integer(row["label"])


def _hellaswag_hub(row: Mapping[str, Any]) -> Parts:
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {"query": _hellaswag_clean(query)}, tuple(map(_hellaswag_clean, row["endings"])), integer(row["label"])


def _hellaswag_clean(text: str) -> str:
    """Remove WikiHow's tags as lm-evaluation-harness 0.4.13 does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _winogrande(row: Mapping[str, Any]) -> Parts:
    prefix, gap, suffix = row["sentence"].partition("_")
    if not gap or not suffix.strip():  # the text after the gap is scored
        raise ValueError(f"column sentence: got {row['sentence']!r}; allowed: a sentence with _ before its end")
    fields = {"sentence": row["sentence"], "prefix": prefix, "suffix": suffix.strip()}
    return fields, (row["option1"], row["option2"]), {"1": 0, "2": 1}.get(str(row["answer"]), -1)


def _labelled(question: str) -> Callable[[Mapping[str, Any]], Parts]:
    """A converter for ARC and OpenBookQA: choices as {text, label}, the answer as one of the labels."""

    def convert(row: Mapping[str, Any]) -> Parts:
        labels, key = list(row["choices"]["label"]), str(row["answerKey"]).strip()
        answer = labels.index(key) if key in labels else -1
        return {"question": row[question]}, tuple(row["choices"]["text"]), answer

    return convert


def _csqa_hub(row: Mapping[str, Any]) -> Parts:
    fields, choices, answer = _labelled("question")(row)
    return {"context": f"Question: {fields['question']}\nAnswer:"}, choices, answer


_ARC = BuiltinBenchmark(("question", "choices", "answerKey"), _question, _labelled("question"), evaluation="test")
BUILTIN: dict[str, BuiltinBenchmark] = {
    "boolq": BuiltinBenchmark(
        ("passage", "question", "label"), _boolq_wheel, _boolq_hub, fields=("passage", "question"), metric="acc"
    ),
    "piqa": BuiltinBenchmark(("goal", "sol1", "sol2", "label"), _piqa, _piqa),
    "hellaswag": BuiltinBenchmark(
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"), _as_it_is("query"), _hellaswag_hub, fields=("query",)
    ),
    "winogrande": BuiltinBenchmark(
        ("sentence", "option1", "option2", "answer"),
        _winogrande,
        _winogrande,
        fields=("sentence", "prefix", "suffix"),
        metric="acc",
    ),
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "openbookqa": BuiltinBenchmark(
        ("question_stem", "choices", "answerKey"), _question, _labelled("question_stem"), evaluation="test"
    ),
}
SEVEN: tuple[str, ...] = tuple(BUILTIN)
# CommonsenseQA (arXiv 1811.00937) stands for a benchmark outside the paper: template sets word it as a custom one.
BUILTIN["csqa"] = BuiltinBenchmark(
    ("question", "choices", "answerKey"), _as_it_is("context"), _csqa_hub, fields=("context",)
)
