"""Custom benchmarks: what the configuration must name, and how a row becomes an example by the columns it names."""

import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from tailored_llama.config import (
    WRITTEN,
    BenchmarkConfig,
    accepted,
    asks_turns,
    columns_in,
    from_json,
    is_written,
    label_of,
)
from tailored_llama.data.builtin import BUILTIN, Parts
from tailored_llama.errors import InputError
from tailored_llama.files import ROW_FILES


def check_benchmark(benchmark: BenchmarkConfig) -> None:
    """Check, without reading data, that a benchmark is built in, or names its columns alone."""
    name, written = benchmark.name, is_written(benchmark)
    builtin = name in BUILTIN
    of_hub = ("source", "subset", "revision")
    decided = ("data", "train", "evaluation", "context", "choices", "labels", "answer")
    refused = (
        (benchmark.metric != "exact_match", ("ignore",), "only with metric exact_match"),
        (builtin, (*of_hub, *decided), f"with a name of your own, as {name} is built in"),
        (benchmark.data is None, ("form", "kind", "unlabelled"), "only with `data`"),
        (benchmark.data is not None, ("train", "evaluation", *of_hub), "only without `data`"),
        (benchmark.source is None, ("subset", "revision"), "only with `source`, a Hub data set"),
        (written, ("choices", "labels"), "only with metric acc or acc_norm"),
        (benchmark.labels is not None, ("choices",), "only without labels"),
        (not written, ("max_new_tokens", "stop"), f"only with metric {', '.join(WRITTEN)}"),
    )
    for applies, fields, allowed in refused:
        for field in fields if applies else ():
            if (value := getattr(benchmark, field)) is not None:
                raise InputError(f"benchmarks.{name}.{field}: got {value!r}; allowed: {allowed}")
    if builtin and written:
        got = f"benchmarks.{name}.metric: got {benchmark.metric!r}"
        raise InputError(f"{got}; allowed: acc or acc_norm, as it has choices")
    if not builtin:
        _check_own(benchmark)


def _check_own(benchmark: BenchmarkConfig) -> None:
    """Check that a benchmark names its rows and its columns."""
    name, where = benchmark.name, f"benchmarks.{benchmark.name}"
    choices = () if is_written(benchmark) or benchmark.labels else ("choices",)
    needed = ("context", *choices, "answer")
    missing = [key for key in needed if not getattr(benchmark, key)]
    if benchmark.data and missing:
        raise InputError(f"{where}.data: got {benchmark.data!r}, no such file; allowed: {ROW_FILES}")
    if not any((benchmark.source, benchmark.evaluation, benchmark.data)):
        missing.append("evaluation")
    if missing:
        raise InputError(
            f"benchmarks: got {name!r}, unknown; allowed: {', '.join(BUILTIN)}, {ROW_FILES}, "
            f"or a new name with train, evaluation, {', '.join(needed[:-1])} and answer "
            f"(not set: {', '.join(missing)})"
        )
    try:
        str(benchmark.context).format(**dict.fromkeys(custom_columns(benchmark), ""))
    except (ValueError, LookupError, AttributeError) as error:  # of the braces, or of more in them than a name
        raise InputError(f"{where}.context: got {benchmark.context!r}, {error}; allowed: {{column}}") from None


def custom_columns(benchmark: BenchmarkConfig) -> list[str]:
    """The columns that a row must have, the answer's last; ValueError: the context is not a format string."""
    choices = [benchmark.choices] if isinstance(benchmark.choices, str) else [*(benchmark.choices or ())]
    return [*_context_columns(benchmark), *choices, str(benchmark.answer)]


def _context_columns(benchmark: BenchmarkConfig) -> list[str]:
    return named_columns(benchmark) or [str(benchmark.context)]


def named_columns(benchmark: BenchmarkConfig) -> list[str]:
    """The columns named in braces in the context; empty if the context is itself a column name."""
    return [name for _, name, _, _ in string.Formatter().parse(str(benchmark.context)) if name is not None]


def unused_columns(benchmark: BenchmarkConfig, columns: Sequence[str]) -> list[str]:
    """The columns of a file that nothing of a benchmark is read from."""
    used = {*custom_columns(benchmark)} | (columns_in(benchmark.form, columns) if benchmark.form else set())
    return [column for column in columns if column not in used]


def custom_parts(benchmark: BenchmarkConfig, row: Mapping[str, Any]) -> Parts:
    """Convert a row to an example's fields, choices and answer.

    Labels are the choices of every row; the answer is the text of one, or a number, its index from 0. A choices column
    holds a list or an object by letters, perhaps as JSON. With one column per choice, missing choices at the end are
    left out. A text answer is the text of a choice, else a letter (A, A. or (A) is the first), else digits (0 is the
    first).
    For written answers, the choices are the accepted texts: a list, a JSON list of texts, one text, or (as in SQuAD) a
    table with a list `text`; for JSON and calls, as `accepted` says. ValueError: a cell is not what its column should
    hold.
    """
    names = _context_columns(benchmark)
    for name in names:
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"column {name}: got {row[name]!r:.80}; allowed: a text")
    written = str(benchmark.context).format(**{name: row[name] for name in names})
    fields = {"context": written if named_columns(benchmark) else row[names[0]]}
    if asks_turns(benchmark):
        turns = [turn for turn in row["turns"] if turn["role"] != "system" or benchmark.context == "prompt"]
        fields["messages"] = json.dumps(turns, ensure_ascii=False)
    answer = row[str(benchmark.answer)]
    if labels := benchmark.labels:
        if (label := label_of(answer)) in labels:
            return fields, labels, labels.index(label)
        if type(answer) is int and 0 <= answer < len(labels):
            return fields, labels, answer
        raise ValueError(f"column {benchmark.answer}: got {answer!r:.80}; allowed: one of the {len(labels)} labels")
    if not is_written(benchmark):
        choices = choices_of(benchmark.choices, row)
        return fields, tuple(choices), _answer_index(answer, choices)
    kind = WRITTEN[benchmark.metric]
    if not (texts := accepted(answer, kind)):
        allowed = {"written": "a text, or a list of texts", "json": "JSON", "call": "a call: its name and arguments"}
        raise ValueError(f"column {benchmark.answer}: got {answer!r:.80}; allowed: {allowed[kind]}")
    return fields, texts, 0


def custom_content(benchmark: BenchmarkConfig, row: Mapping[str, Any], choices: Sequence[str]) -> list[str]:
    """Return what tells a row from others: the texts of its context without the words around them, and its choices.

    Rows with another answer, or with the choices in another order, ask the same. Neither labels nor the wording of
    messages count, because other rows decide them.
    """
    names = ["system", "user"] if benchmark.form == "messages" else sorted(set(_context_columns(benchmark)))
    texts = [str(row[name]) for name in names]
    return texts if is_written(benchmark) or benchmark.labels else [*texts, *sorted(choices)]


def choices_of(named: str | Sequence[str] | None, row: Mapping[str, Any]) -> list[Any]:
    """The choices in the column or the columns of a row that have them; ValueError: a column holds something else."""
    if isinstance(named, str):
        cell = row[named]
        choices = from_json(cell) if isinstance(cell, str) else cell
        if isinstance(choices, list):
            return choices
        if not isinstance(choices, dict) or not string.ascii_lowercase.startswith("".join(sorted(choices)).lower()):
            kind = "JSON list" if isinstance(cell, str) else "list"
            raise ValueError(f"column {named}: got {cell!r:.80}; allowed: a {kind} of texts")
        choices = [choices[letter] for letter in sorted(choices)]
    else:
        choices = [row[column] for column in named or ()]
    while choices and (choices[-1] is None or choices[-1] == "" or choices[-1] != choices[-1]):  # NaN: missing
        choices.pop()
    return choices


def _answer_index(answer: Any, choices: Sequence[Any]) -> int:
    """The index that an answer means, as written in JSON, Parquet or CSV; -1 if it means none."""
    if isinstance(answer, float) and answer.is_integer():  # pandas turns an integer column with a gap into floats
        answer = int(answer)
    text, texts = str(answer).strip(), [str(choice).strip() for choice in choices]
    letter = re.fullmatch(r"\(?([A-Za-z])[.)]?", text)
    if isinstance(answer, str):
        for told in filter(None, (text, letter and letter[1])):
            if told in texts:
                return texts.index(told)
        if letter:
            return ord(letter[1].upper()) - ord("A")
    return int(text) if re.fullmatch(r"\d{1,9}", text) else -1
