"""Metrics of written answers: SQuAD's exact match and F1 (arXiv 1606.05250, section 6.1), JSON and calls of tools.

A metric is a function of the written and the accepted texts, from 0 to 1. A new one needs an entry in `METRICS`, with
its function and its form, from which its floor follows; and its name in `config.forms`, in `Metric` and in `METRICS`.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa

from tailored_llama.config import calls_of, from_json
from tailored_llama.data import UNLABELLED, Prompt

Ignored = Sequence[str] | None
Value = Callable[[str, Sequence[str]], float]
Path = tuple[str | int, ...]  # of a field in JSON: names, and positions in lists


@dataclass(frozen=True)
class WrittenMetric:
    """What is measured where a metric is the headline: itself and what stands beside it."""

    values: Mapping[str, Value]
    form: Callable[[str], str]  # of an answer: two of one form are the same where the metric is right or wrong


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    bare = _without(text.lower(), string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _without(text: str, characters: str) -> str:
    return text.translate(str.maketrans("", "", characters))


def _form(text: str, ignore: Ignored) -> str:
    """A text without what is ignored, in the order of lm-evaluation-harness; with None, in SQuAD's normal form."""
    if ignore is None:
        return normalise(text)
    text = text.strip() if "spaces" in ignore else text
    text = text.lower() if "case" in ignore else text
    text = _without(text, string.punctuation) if "punctuation" in ignore else text
    return _without(text, string.digits) if "numbers" in ignore else text


def exact_match(text: str, accepted: Sequence[str], ignore: Ignored = None) -> float:
    """1 if the text equals an accepted one but for what is ignored, else 0; with None, in SQuAD's normal form.

    With `ignore` it is lm-evaluation-harness's exact match.
    """
    return float(_form(text, ignore) in [_form(answer, ignore) for answer in accepted])


def f1(text: str, accepted: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall in normal form, against the best-matching accepted text."""
    return max(_f1(normalise(text).split(), normalise(answer).split()) for answer in accepted)


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    return 2 * (Counter(words) & Counter(wanted)).total() / (len(words) + len(wanted))


def valid_json(text: str, accepted: Sequence[str]) -> float:
    """1 if the text is JSON, else 0."""
    return float(_fields(text) is not None)


def equal_fields(text: str, accepted: Sequence[str]) -> float:
    """The fields that equal those of the best-matching accepted JSON, as a share of all fields of both."""
    written = (_fields(text) or {}).items()
    return max(
        len(written & wanted) / len({path for path, _ in written | wanted})
        for wanted in ((_fields(answer) or {(): answer}).items() for answer in accepted)
    )


def same_json(text: str, accepted: Sequence[str]) -> float:
    """1 if all fields equal those of an accepted JSON, else 0. Key order, white space and 1 for 1.0 do not matter."""
    return float(equal_fields(text, accepted) == 1)


def same_call(text: str, accepted: Sequence[str]) -> float:
    """1 if the text calls the tool of an accepted call, with the argument values of any of that tool's, else 0.

    An argument may be left out if one of those calls has none. Several calls, a list, count by their positions.
    """
    names, written = _arguments(text)
    same = [arguments for tools, arguments in map(_arguments, accepted) if tools == names]
    keys = {key for arguments in (written, *same) for key in arguments}
    is_right = all(any(written.get(key) == arguments.get(key) for arguments in same) for key in keys)
    return float(bool(names and same) and is_right)


def _arguments(text: str) -> tuple[list[str], dict[tuple[int, str], dict[Path, str]]]:
    """The names of the tools that a text calls, and the arguments by the position of the call and their names."""
    calls = calls_of(from_json(text, parse_float=_number))
    numbered = {(i, name): _flat(value) for i, call in enumerate(calls) for name, value in call["arguments"].items()}
    return [call["name"] for call in calls], numbered


@lru_cache(maxsize=65_536)  # the floor compares each accepted text with many others
def _fields(text: str) -> dict[Path, str] | None:
    """The fields of a text in JSON; None: it is something else."""
    value = from_json(text, parse_float=_number)
    return None if value is None else _flat(value)


def _flat(value: Any) -> dict[Path, str]:
    """The fields of a value, down to those that have none in them, each as JSON."""
    fields, left = dict[Path, str](), list[tuple[Path, Any]]([((), value)])
    while left:
        path, value = left.pop()
        if value and isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            left += [((*path, key), member) for key, member in inner]
        else:
            fields[path] = json.dumps(value)
    return fields


def answer_form(metric: str, ignore: Ignored = None) -> Callable[[str], str]:
    """The normal form of an answer, as in `WrittenMetric`; choices are texts. `ignore` is as in `exact_match`."""
    return METRICS[metric](ignore).form if metric in METRICS else str.strip


def _json_form(text: str) -> str:
    value = from_json(text, parse_float=_number)
    calls = calls_of(value)
    value = calls[0] if len(calls) == 1 else value  # alone or in a list, it is the same call
    return text.strip() if value is None else json.dumps(value, sort_keys=True)


def _number(text: str) -> float:
    """A number of JSON with a point or an exponent; 1.0 is 1."""
    return int(value) if (value := float(text)).is_integer() else value


def _text(ignore: Ignored) -> WrittenMetric:
    return WrittenMetric({"exact_match": partial(exact_match, ignore=ignore), "f1": f1}, partial(_form, ignore=ignore))


_JSON: dict[str, Value] = {"valid_json": valid_json, "equal_fields": equal_fields}
METRICS: dict[str, Callable[[Ignored], WrittenMetric]] = {  # headline → what is measured, `ignore` as in `exact_match`
    "exact_match": _text,
    "f1": _text,
    "json": lambda _: WrittenMetric({"json": same_json, **_JSON}, _json_form),
    "tool_call": lambda _: WrittenMetric({"tool_call": same_call, **_JSON}, _json_form),
}


def answers_schema(metric: str) -> pa.Schema:
    """The columns of `answers.parquet`: what was written, what is accepted, and what is measured with this headline."""
    columns = {"example": pa.int32(), "text": pa.string(), "accepted": pa.list_(pa.string())}
    return pa.schema(columns | dict.fromkeys(METRICS[metric](None).values, pa.float64()))


def judge(prompts: Sequence[Prompt], texts: Sequence[str], metric: str, ignore: Ignored = None) -> dict[str, list[Any]]:
    """The columns of `answers.parquet`, which compare written with accepted texts; `ignore` as in `exact_match`."""
    accepted = [accepted_texts(prompt, ignore) for prompt in prompts]
    pairs = list(zip(texts, accepted, strict=True))
    values = {name: [value(*pair) for pair in pairs] for name, value in METRICS[metric](ignore).values.items()}
    return {
        "example": [prompt.example for prompt in prompts],
        "text": [text.strip() for text in texts],
        "accepted": accepted,
        **values,
    }


def accepted_texts(prompt: Prompt, ignore: Ignored) -> list[str]:
    """The accepted texts of a prompt, without their delimiter; without outer spaces unless those count."""
    if ignore is None:
        return [continuation.strip() for continuation in prompt.continuations]
    pairs = zip(prompt.continuations, prompt.choice_lengths, strict=True)
    return [continuation[len(continuation) - length :] for continuation, length in pairs]


def written_floor(prompts: Sequence[Prompt], metric: str, ignore: Ignored = None) -> float:
    """The score without skill: always writing the one accepted text that does best in the metric.

    Only the 50 most common accepted texts, by their form, are tried. `ignore` is as in `exact_match`. Prompts without a
    label are left out; it is 0 if all are.
    """
    known = [prompt for prompt in prompts if prompt.answer != UNLABELLED]
    measured, accepted = METRICS[metric](ignore), [accepted_texts(prompt, ignore) for prompt in known]
    common = Counter(text for texts in accepted for text in {*map(measured.form, texts)}).most_common(50)
    value = measured.values[metric]
    return max((sum(value(text, texts) for texts in accepted) / len(known) for text, _ in common), default=0.0)
