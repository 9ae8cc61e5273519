"""What a benchmark leaves to its files: the columns of the user's own rows, and what their answers are."""

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailored_llama.config import forms
from tailored_llama.config.forms import LABELS, METRICS, TEXTS, WRITTEN, Form, Kind, accepted, calls_of, from_json
from tailored_llama.config.inputs import BenchmarkConfig
from tailored_llama.errors import InputError

COMMON = {  # field → the names of columns that may hold it
    "context": ("question", "prompt", "instruction", *TEXTS),
    "choices": ("choices",),
    "answer": ("answer", "completion", "output", "response", "target", *LABELS),
}
NEEDED: dict[Any, tuple[str, ...]] = {  # kind, None while it is unknown → fields beside the context and the answer
    "labels": ("labels",),
    "choices": ("choices",),
    **dict.fromkeys(("written", "json", "call"), ("max_new_tokens", "stop")),
    None: ("kind",),
}
ASKING = ("question", "query", "prompt", "instruction")  # columns that may stand beside one with a text
SHOWN = 5  # rare labels in a message
OPTION = r"(?i)(?:option|choice)[ _-]?([a-h]|\d+)"  # a column with one choice
IN_ORDER = tuple(map("".join, (string.ascii_lowercase, map(str, range(100)), map(str, range(1, 100)))))
FROM_ZERO = 50  # rows of which one at least has the first choice as its answer
LEAST_TOKENS, ROOM = 32, 8  # of a written answer; the tokens beyond the longest one


def resolved_fields(benchmark: BenchmarkConfig) -> dict[str, Any]:
    """The fields of a benchmark that are set, and those that its file decides.

    What is set stays. If that is everything, nothing is read. A file that is not there is left for later, so that a
    configuration loads without it.

    Raises:
        InputError: a column is missing or several may be meant, or the answers are of no one kind.
    """
    given = benchmark.model_dump(exclude_none=True)
    if benchmark.data is None:
        return given
    shown: Kind | None = "labels" if benchmark.labels else "choices" if benchmark.choices else None
    kind = given["kind"] = benchmark.kind or WRITTEN.get(benchmark.metric) or shown
    if not (path := Path(benchmark.data).expanduser()).is_file():
        return given
    if any(given.get(key) is None for key in ("context", "answer", *NEEDED[kind])):
        given = _completed(given, path)
    if given["kind"] in WRITTEN.values():
        given.setdefault("metric", METRICS[given["kind"]][0])
    return given


def _completed(given: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a benchmark with those that its file decides."""
    from tailored_llama.files import read_file  # with pyarrow, which takes half a second

    where, rows = f"benchmarks.{given['name']}", read_file(path)
    if "context" not in given or given.get("answer") not in [*rows[0]]:
        given.setdefault("form", forms.form_of(rows[0]))
    if given.get("form"):
        rows = forms.in_form(rows, given["form"], f"{where}: {path.name}", bool(given.get("unlabelled")))
        given = _of_form(given["form"], rows) | given
    is_found = "context" not in given
    given = _with_columns(given, where, [*rows[0]])
    if is_found:
        _check_unused(given, where, rows)
    cells = [row.get(given["answer"]) for row in rows]
    if given.get("unlabelled"):
        cells = [cell for cell in cells if forms.is_answered(cell)]
    if not given["kind"]:
        kind, texts = _kind_of_all(where, given["answer"], cells, given.get("form")), [accepted(cell) for cell in cells]
        several = [number for number, own in enumerate(texts) if len(own) > 1]
        if kind == "written" and several and given["answer"].lower() in LABELS:
            got = f"{where}: column {given['answer']}: got {cells[several[0]]!r:.80} in row {several[0]}"
            allowed = 'one label, or kind = "json" (the list is the answer) or "written" (each text is a right answer)'
            raise InputError(f"{got}; allowed: {allowed}")
        is_text = not any(isinstance(cell, list | dict) for cell in cells)
        if kind == "written" and is_text and forms.is_labelled(given["answer"], texts):
            kind = "labels"
        given["kind"] = "labels" if given.get("metric") else kind  # it is acc or acc_norm
    if given["kind"] == "labels" and not given.get("labels"):
        given["labels"] = _labels(where, given["answer"], [forms.label_of(cell) for cell in cells])
    if given["kind"] == "choices":
        _check_indices(f"{where}: column {given['answer']}", given["choices"], cells, rows)
    if given["kind"] in WRITTEN.values():
        given = _limits([text for cell in cells for text in accepted(cell, given["kind"])], given["kind"]) | given
    return given


def _of_form(form: Form, rows: Sequence[forms.Row]) -> dict[str, Any]:
    """The columns of rows in a form. A system message that all rows share is the benchmark's instruction."""
    if form == "alpaca":
        return {"context": "prompt", "answer": "output"}
    system, *others = {row["system"] for row in rows}
    instruction = {"instruction": system} if system and not others else {}
    return {"context": "prompt" if others else "user", "answer": "assistant", **instruction}


def _with_columns(given: dict[str, Any], where: str, columns: Sequence[str]) -> dict[str, Any]:
    """The fields with the columns that have common names. Capitals do not matter.

    A question is written as "Question: …" and "Answer:"; a text that has a label likewise, by the names of both. A text
    and what asks about it are joined.
    """
    kind, found, problems = given["kind"], dict[str, Any](), list[str]()
    letters = tuple(sorted((c for c in columns if len(c) == 1 and c in string.ascii_letters), key=str.lower))
    for key in COMMON:
        if given.get(key) is not None or (key == "choices" and kind not in (None, "choices")):
            continue
        several: list[Any] = [column for column in columns if column.lower() in COMMON[key]]
        if key == "choices" and len(letters) > 1:
            several.append(letters)
        if key == "choices" and not several:
            several = _options(columns)
        ends = ["".join(re.findall(r"\d+$|.$", c)[0] for c in own).lower() for own in several if isinstance(own, tuple)]
        if key == "context" and len(several) == 2 and len(asking := [c for c in several if c.lower() in ASKING]) == 1:
            several = [_joined(asking[0], *(column for column in several if column not in asking))]
        gap = len(several) == 1 and any(not any(row.startswith(end) for row in IN_ORDER) for end in ends)
        if len(several) == 1 and not gap:
            found[key] = several[0]
        elif several or key != "choices" or kind:
            shown = " and ".join(own if isinstance(own, str) else f"({', '.join(own)})" for own in several)
            none = f"no column is called {', '.join(COMMON[key])}{', or a, b and so on' * (key == 'choices')}"
            why = f"{shown} leave one out" if gap else f"{shown} may be meant" if several else none
            problems.append(f"{key} is not set, and {why}")
    if problems:
        allowed = f"columns of the file ({', '.join(columns)}), named as rows.context, rows.answer and so on"
        raise InputError(f"{where}: {'; '.join(problems)}; allowed: {allowed}")
    given |= found
    if given.get("choices"):
        given["kind"] = kind or "choices"
    if given["answer"] not in columns:
        raise InputError(f"{where}.answer: got {given['answer']!r}; allowed: a column ({', '.join(columns)})")
    context, answer = str(found.get("context")), str(given["answer"])
    if context.lower() == "question":
        given["context"] = f"Question: {{{context}}}\nAnswer:"
    elif context.lower() in TEXTS and answer.lower() in LABELS and given["kind"] != "choices":
        given["context"] = f"{context.capitalize()}: {{{context}}}\n{answer.capitalize()}:"
    return given


def _joined(asking: str, text: str) -> str:
    """The context of two columns: an instruction and its text, or a text and what is asked about it."""
    if asking.lower() in ("question", "query"):
        return f"{text.capitalize()}: {{{text}}}\n{asking.capitalize()}: {{{asking}}}\nAnswer:"
    first, second = (asking, text) if asking.lower() == "instruction" else (text, asking)
    return f"{{{first}}}\n\n{{{second}}}"


def _check_unused(given: dict[str, Any], where: str, rows: Sequence[forms.Row]) -> None:
    """Refuse rows with a long text that differs by row, if nothing is read from its column."""
    choices = given.get("choices") or ()
    context = str(given["context"])
    used = {name for _, name, _, _ in string.Formatter().parse(context) if name} | {context, given["answer"]}
    used |= {choices} if isinstance(choices, str) else {*choices}
    without = context if "{" in context else f"{{{context}}}"
    for column in (own for own in rows[0] if own not in used):
        if forms.is_long_text([cell for row in rows if isinstance(cell := row.get(column), str)], len(rows)):
            to_use, to_leave = (json.dumps(c, ensure_ascii=False) for c in (f"{{{column}}}\n{without}", without))
            raise InputError(
                f"{where}: column {column}: got a long text that differs by row and is not used; allowed: "
                f"rows.context = {to_use} to use it, or rows.context = {to_leave} to leave it out"
            )


def _options(columns: Sequence[str]) -> list[Any]:
    """The column `options`, and the columns with an option each, of a file whose answers are in no column of labels."""
    if any(column.lower() in LABELS[1:] for column in columns):
        return []
    each = [column for column in columns if re.fullmatch(OPTION, column)]
    ordered = tuple(sorted(each, key=lambda column: (len(column), column.lower())))
    return [column for column in columns if column.lower() == "options"] + [ordered] * (len(each) > 1)


def _check_indices(where: str, choices: Any, cells: Sequence[Any], rows: Sequence[forms.Row]) -> None:
    """Refuse answers that count the choices from 1, which a file shows in that none of many is 0."""
    numbers = {forms.label_of(cell) for cell in cells}
    columns = [choices] if isinstance(choices, str) else choices
    held = [from_json(cell) if isinstance(cell := row.get(own), str) else cell for row in rows for own in columns]
    texts = {forms.label_of(text) for cell in held for text in (cell if isinstance(cell, list) else [cell])}
    if len(cells) >= FROM_ZERO and all(map(str.isdecimal, numbers)) and "0" not in numbers and not numbers <= texts:
        got = f"got numbers from {min(numbers, key=int)} to {max(numbers, key=int)}"
        raise InputError(f"{where}: {got}; allowed: a choice's letter, its text, or its index, of which the first is 0")


def _kind_of_all(where: str, column: str, cells: Sequence[Any], form: Form | None = None) -> Kind:
    """The kind of written answers; InputError: they are of several. A message that is a list of texts is JSON."""
    first = dict[str, int]()
    for number, cell in enumerate(cells):
        if cell is not None and cell != "":  # such a row is refused when it is read
            listed = from_json(cell) if form == "messages" and isinstance(cell, str) else None
            is_json = isinstance(listed, list) and all(isinstance(part, str) for part in listed)
            first.setdefault("JSON" if is_json and _what(cell) == "a text" else _what(cell), number)
    if len(first) > 1:
        shown = " and ".join(f"{what} in row {number}" for what, number in first.items())
        overruled = ', or kind = "written"' * all(isinstance(cells[number], str) for number in first.values())
        raise InputError(f"{where}: column {column}: got {shown}; allowed: answers of one kind{overruled}")
    return "call" if "a call" in first else "json" if "JSON" in first else "written"


def _what(answer: Any) -> str:
    """What an answer is, in words. A number is a text, and so is a list of texts that is written as JSON."""
    values = [from_json(told) if isinstance(told, str) else told for told in forms.answers_in(answer)]
    if all(map(calls_of, values)):
        return "a call"
    if isinstance(answer, dict) and isinstance(answer.get("text"), list):
        return "a table"
    if all(isinstance(v, dict) or (isinstance(v, list) and v and isinstance(v[0], dict | list)) for v in values):
        return "JSON"
    return "a list" if isinstance(answer, list) else "a text"


def _labels(where: str, column: str, values: Sequence[str]) -> tuple[str, ...]:
    """The labels in order. Rows without one are refused with their numbers when they are read."""
    counts = Counter(filter(None, values))
    if len(counts) < 2:
        raise InputError(f"{where}: column {column}: got no two different labels; allowed: two or more")
    if once := [label for label, count in counts.items() if count == 1]:
        told = ", ".join(f"{label!r} (row {values.index(label)})" for label in once[:SHOWN])
        more = f" and {len(once) - SHOWN} more" * (len(once) > SHOWN)
        overruled = ', or kind = "written"' * (column.lower() not in LABELS)
        raise InputError(
            f"{where}: column {column}: got one row for each of these labels: {told}{more}; "
            f"allowed: two rows or more for each label{overruled}"
        )
    return tuple(sorted(counts))


def _limits(answers: Sequence[str], kind: Kind) -> dict[str, Any]:
    """What ends a written answer: tokens enough for the longest, and more line breaks than any has in a row.

    No line break ends JSON.
    """
    # Words of three letters and single other bytes are more than the tokens of any usual tokenizer.
    pieces = (len(re.findall(rb"[A-Za-z]{1,3}|[^A-Za-z ]", answer.encode())) for answer in answers)
    breaks = (len(found) for answer in answers for found in re.findall(r"\n+", answer.strip()))
    tokens = max(LEAST_TOKENS, max(pieces, default=0) + ROOM)
    stop = ("\n" * (1 + max(breaks, default=0)),) if kind == "written" else ()
    return {"max_new_tokens": tokens, "stop": stop}
