"""A benchmark in one file of the user's own: its name, the form of its rows, its columns, and what its answers are."""

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tailored_llama.errors import InputError

Form = Literal["messages", "alpaca"]
Kind = Literal["labels", "choices", "written"]
Row = Mapping[str, Any]

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
OTHER_SOURCES = ("train", "evaluation", "source", "subset", "revision")  # fields that `data` replaces
FORMS: dict[Form, tuple[str, ...]] = {"messages": ("messages",), "alpaca": ("instruction", "output")}
TEXTS = ("text", "sentence", "review", "content", "message", "input", "query")
LABELS = ("label", "category", "class", "intent", "topic", "sentiment")
COMMON = {  # field → the names of columns that may hold it
    "context": ("question", "context", "prompt", "instruction", *TEXTS),
    "choices": ("choices",),
    "answer": ("answer", "completion", "output", "response", "target", *LABELS),
}
NEEDED: dict[Any, tuple[str, ...]] = {  # kind, None while it is unknown → fields beside the context and the answer
    "labels": ("labels",),
    "choices": ("choices",),
    "written": ("max_new_tokens", "stop"),
    None: ("kind",),
}
WRITTEN = ("exact_match", "f1")  # metrics of written answers

# Answers that nothing calls labels are labels if there are few of them, and each has several rows. Numbers are counted
# more strictly, since the sums of small numbers come again as well.
MOST_LABELS, MOST_NUMBERS, LONGEST_LABEL, ROWS_A_LABEL = 200, 10, 100, 5
LEAST_TOKENS, ROOM = 32, 8  # of a written answer; the tokens beyond the longest one


def as_benchmark(value: Any) -> Any:
    """A benchmark's table; a text is the name of a benchmark, or the path of a file that holds one."""
    if not isinstance(value, str):
        return value
    return {"data" if Path(value).suffix in SUFFIXES else "name": value}


def with_form(table: Mapping[str, Any]) -> dict[str, Any]:
    """A benchmark's table with `data`, completed from the file: its name, the form, the columns and the kind of answer.

    What is set stays. If that is everything, the file is not read. A file that is not there is left for later, so that
    a configuration loads without it.

    Raises:
        InputError: `data` stands beside another source or is no table, fields contradict each other, a column is
            missing or several may be meant, or the answers are neither labels nor text.
    """
    given = {key: value for key, value in table.items() if value is not None}
    file, metric, kind = given["data"], given.get("metric"), given.get("kind")
    path = Path(file).expanduser()
    name = given.get("name") or re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).lstrip("-._")
    where = f"benchmarks.{name}.data: got {file!r}"
    if others := [key for key in OTHER_SOURCES if key in given]:
        raise InputError(f"{where} with {others[0]} = {given[others[0]]!r}; allowed: data alone, or {others[0]}")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{where}; allowed: a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    if kind and metric and (kind == "written") != (metric in WRITTEN):
        metrics = " or ".join(WRITTEN) if kind == "written" else "acc or acc_norm"
        raise InputError(f"benchmarks.{name}.metric: got {metric!r} with kind = {kind!r}; allowed: {metrics}")
    shown = (key for key in ("labels", "choices") if given.get(key))
    kind = kind or ("written" if metric in WRITTEN else next(shown, None))
    given |= {"name": name, "kind": kind}
    is_known = kind in [*NEEDED] and given.get("form") in (None, *FORMS)  # else it is refused with all other fields
    if not is_known or not path.is_file():
        return {**table, **given}
    if any(given.get(key) is None for key in ("context", "answer", *NEEDED[kind])):
        given = _completed(given, path)
    if given["kind"] == "written":
        given.setdefault("metric", "exact_match")
    return {**table, **given}


def _completed(given: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a benchmark with those that its file decides."""
    from tailored_llama.files import read_file

    where, rows = f"benchmarks.{given['name']}", read_file(path)
    names = {column.lower() for column in rows[0]}
    if "context" not in given or given.get("answer") not in [*rows[0]]:
        given.setdefault("form", next((form for form, columns in FORMS.items() if names.issuperset(columns)), None))
    if given.get("form"):
        rows = in_form(rows, given["form"], f"{where}: {path.name}")
        given = _of_form(given["form"], rows) | given
    given = _with_columns(given, where, [*rows[0]])
    answers = [accepted(row.get(given["answer"])) for row in rows]
    if not given["kind"]:
        _check_alike(where, given["answer"], rows)
        chosen = given.get("metric") or is_labelled(given["answer"], answers)  # no metric of written answers is set
        given["kind"] = "labels" if chosen else "written"
    if given["kind"] == "labels" and not given.get("labels"):
        given["labels"] = _labels(where, given["answer"], [label_of(row.get(given["answer"])) for row in rows])
    if given["kind"] == "written":
        given = _limits([text for texts in answers for text in texts]) | given
    return given


def _of_form(form: Form, rows: Sequence[Row]) -> dict[str, Any]:
    """The columns of rows in a form. A system message that all rows share is the benchmark's instruction."""
    if form == "alpaca":
        return {"context": "prompt", "answer": "output"}
    system, *others = {row["system"] for row in rows}
    instruction = {"instruction": system} if system and not others else {}
    return {"context": "prompt" if others else "user", "answer": "assistant", **instruction}


def in_form(rows: Sequence[Row], form: Form, where: str) -> list[dict[str, Any]]:
    """Rows with the columns that a form stands for; InputError: a row has another form, after `where`.

    messages: `turns`, those before the answer; `system`; `user`, the texts of all others; `assistant`, the answer; and
    `prompt`, all but the answer. alpaca: `output`, and `prompt`, the instruction and the input, if there is one.
    """
    shaped = []
    for number, row in enumerate(rows):
        cells = {column.lower(): value for column, value in row.items()}
        try:
            told = _turns(cells) if form == "messages" else {"output": cells.get("output")}
        except ValueError as error:
            raise InputError(f"{where} row {number}: {error}") from None
        parts = ("system", "user") if form == "messages" else ("instruction", "input")
        texts = [text for part in parts if isinstance(text := (cells | told).get(part), str) and text.strip()]
        shaped.append({**row, **told, "prompt": "\n\n".join(texts)})
    return shaped


def _turns(cells: Row) -> dict[str, Any]:
    """The messages of a row, and their texts; ValueError: they are no words, or not questions with answers in turn."""
    cell = cells.get("messages")
    messages = from_json(cell) if isinstance(cell, str) else cell
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"column messages: got {str(cell)[:80]!r}; allowed: a list of messages")
    if cells.get("tools") or any(message.get("tool_calls") or message.get("function_call") for message in messages):
        raise ValueError("got tools or a call of one; allowed: messages in words alone")
    roles = [str(message.get("role")) for message in messages]
    asked = len(roles) - (roles[:1] == ["system"])
    if not asked or roles[-asked:] != ["user", "assistant"] * (asked // 2):
        allowed = "system (or none), then user and assistant in turn, assistant last"
        raise ValueError(f"column messages: got the roles {', '.join(roles) or 'of none'}; allowed: {allowed}")
    *texts, answer = (_words(role, own.get("content")) for role, own in zip(roles, messages, strict=True))
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    texts = ["", *texts][-asked:]  # the system's first
    return {"turns": turns, "system": texts[0], "user": "\n\n".join(texts[1:]), "assistant": answer}


def _words(role: str, content: Any) -> str:
    """The content of a message as text."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts) or not "".join(map(str, texts)).strip():
        raise ValueError(f"column messages: got {str(content)[:80]!r} from {role}; allowed: a text")
    return "".join(map(str, texts))


def from_json(text: str) -> Any:
    """The value of a text in JSON; None: it is another text."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _with_columns(given: dict[str, Any], where: str, columns: Sequence[str]) -> dict[str, Any]:
    """The fields with the columns that have common names. Capitals do not matter.

    A question is written as "Question: …" and "Answer:"; a text that has a label likewise, by the names of both.
    """
    kind, found, problems = given["kind"], dict[str, Any](), list[str]()
    letters = tuple(sorted((c for c in columns if len(c) == 1 and c in string.ascii_letters), key=str.lower))
    for key in COMMON:
        if given.get(key) is not None or (key == "choices" and kind not in (None, "choices")):
            continue
        several: list[Any] = [column for column in columns if column.lower() in COMMON[key]]
        if key == "choices" and len(letters) > 1:
            several.append(letters)
        gap = several == [letters] and not string.ascii_lowercase.startswith("".join(letters).lower())
        if len(several) == 1 and not gap:
            found[key] = several[0]
        elif several or key != "choices" or kind:
            shown = " and ".join(own if isinstance(own, str) else f"({', '.join(own)})" for own in several)
            none = f"no column is called {', '.join(COMMON[key])}{', or a, b and so on' * (key == 'choices')}"
            why = f"{shown} leave out a letter" if gap else f"{shown} may be meant" if several else none
            problems.append(f"{key} is not set, and {why}")
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}; allowed: columns of the file ({', '.join(columns)})")
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


def accepted(answer: Any) -> tuple[str, ...]:
    """The texts that a written answer may be: one, a list (also as JSON), or `text` in a table, as in SQuAD."""
    if isinstance(answer, str):
        listed = from_json(answer) if answer.startswith("[") else None
        answer = listed if isinstance(listed, list) and all(isinstance(text, str) for text in listed) else [answer]
    if isinstance(answer, Mapping):
        answer = answer.get("text")
    texts = answer if isinstance(answer, list) else [label_of(answer)]
    return tuple(dict.fromkeys(texts)) if all(isinstance(text, str) and text.strip() for text in texts) else ()


def label_of(value: Any) -> str:
    """A cell as a label: a number as it is written, empty for a missing one."""
    if isinstance(value, float) and value.is_integer():  # pandas turns integers with a gap into floats
        value = int(value)
    if isinstance(value, str):
        return value.strip()
    return json.dumps(value) if isinstance(value, (int, float)) and value == value else ""


def is_labelled(column: str, answers: Sequence[Sequence[str]]) -> bool:
    """Decide whether answers are labels: few that come again and again.

    In a column that is called a label, they are unless most of them differ.
    """
    if any(len(texts) > 1 for texts in answers):
        return False
    counts = Counter(text.strip() for (text,) in filter(None, answers))
    rows, different = counts.total(), len(counts)
    if column.lower() in LABELS:
        return 2 * different <= rows
    numbers = all(re.fullmatch(r"[-+]?[\d.,]+", text) for text in counts)
    short = all(len(text) <= LONGEST_LABEL and "\n" not in text and text[0] not in "{[" for text in counts)
    return short and ROWS_A_LABEL * different <= rows and different <= (MOST_NUMBERS if numbers else MOST_LABELS)


def _check_alike(where: str, column: str, rows: Sequence[Row]) -> None:
    """Check that all answers are a text, or a list of them, or a table."""
    first, kinds = dict[str, int](), dict[Any, str]([(list, "a list"), (dict, "a table")])
    for number, row in enumerate(rows):
        first.setdefault(kinds.get(type(row.get(column)), "a text"), number)
    if len(first) > 1:
        shown = " and ".join(f"{kind} in row {number}" for kind, number in first.items())
        raise InputError(f"{where}: column {column}: got {shown}; allowed: answers of one kind")


def _labels(where: str, column: str, values: Sequence[str]) -> tuple[str, ...]:
    """The labels in order. Rows without one are refused with their numbers when they are read."""
    counts = Counter(filter(None, values))
    if len(counts) < 2:
        raise InputError(f"{where}: column {column}: got no two different labels; allowed: two or more")
    if once := [label for label, count in counts.items() if count == 1]:
        (common, _), *_ = counts.most_common(1)
        raise InputError(
            f"{where}: column {column}: got {once[0]!r} in row {values.index(once[0])} alone, beside labels such as "
            f'{common!r} in row {values.index(common)}; allowed: labels of two rows or more, or kind = "written"'
        )
    return tuple(sorted(counts))


def _limits(answers: Sequence[str]) -> dict[str, Any]:
    """What ends a written answer: tokens enough for the longest, and more line breaks than any has in a row."""
    # Words of three letters and single other bytes are more than the tokens of any usual tokenizer.
    pieces = (len(re.findall(rb"[A-Za-z]{1,3}|[^A-Za-z ]", answer.encode())) for answer in answers)
    breaks = (len(found) for answer in answers for found in re.findall(r"\n+", answer.strip()))
    tokens = min(max(LEAST_TOKENS, max(pieces, default=0) + ROOM), 4096)
    return {"max_new_tokens": tokens, "stop": ("\n" * (1 + max(breaks, default=0)),)}
