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
Kind = Literal["labels", "choices", "written", "json", "call"]
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
    **dict.fromkeys(("written", "json", "call"), ("max_new_tokens", "stop")),
    None: ("kind",),
}
METRICS: dict[Any, tuple[str, ...]] = {  # kind → its metrics; the first of a written kind is its default
    **dict.fromkeys(("labels", "choices"), ("acc", "acc_norm")),
    "written": ("exact_match", "f1"),
    "json": ("json",),
    "call": ("tool_call",),
}
# The metrics of answers that the model writes → their kinds
WRITTEN: dict[Any, Kind] = {metric: kind for kind in ("written", "json", "call") for metric in METRICS[kind]}

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
    if kind and metric and metric not in (metrics := METRICS.get(str(kind), (metric,))):
        allowed = " or ".join(metrics)
        raise InputError(f"benchmarks.{name}.metric: got {metric!r} with kind = {kind!r}; allowed: {allowed}")
    shown = (key for key in ("labels", "choices") if given.get(key))
    kind = kind or WRITTEN.get(str(metric)) or next(shown, None)
    given |= {"name": name, "kind": kind}
    is_known = kind in [*NEEDED] and given.get("form") in (None, *FORMS)  # else it is refused with all other fields
    if not is_known or not path.is_file():
        return {**table, **given}
    if any(given.get(key) is None for key in ("context", "answer", *NEEDED[kind])):
        given = _completed(given, path)
    if given["kind"] in WRITTEN.values():
        given.setdefault("metric", METRICS[given["kind"]][0])
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
    cells = [row.get(given["answer"]) for row in rows]
    if not given["kind"]:
        kind = _kind_of_all(where, given["answer"], cells)
        if kind == "written" and is_labelled(given["answer"], [accepted(cell) for cell in cells]):
            kind = "labels"
        given["kind"] = "labels" if given.get("metric") else kind  # it is acc or acc_norm
    if given["kind"] == "labels" and not given.get("labels"):
        given["labels"] = _labels(where, given["answer"], [label_of(cell) for cell in cells])
    if given["kind"] in WRITTEN.values():
        given = _limits([text for cell in cells for text in accepted(cell, given["kind"])], given["kind"]) | given
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

    messages: `turns`, those before the answer; `system`; `user`, the texts of all others, after the tools; `assistant`,
    the answer; and `prompt`, all but the answer. alpaca: `output`, and `prompt`, the instruction with any input.
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
    roles = [str(message.get("role")) for message in messages]
    asked = len(roles) - (roles[:1] == ["system"])
    if not asked or roles[-asked:] != ["user", "assistant"] * (asked // 2):
        allowed = "system (or none), then user and assistant in turn, assistant last"
        raise ValueError(f"column messages: got the roles {', '.join(roles) or 'of none'}; allowed: {allowed}")
    call, tools = _call(messages[-1]), _tools(cells.get("tools"))
    contents = [message.get("content") for message in messages[:-1]] + [call or messages[-1].get("content")]
    *texts, answer = (_words(role, content) for role, content in zip(roles, contents, strict=True))
    if tools and not calls_of(from_json(answer)):
        raise ValueError(f"got tools and the answer {answer[:80]!r}; allowed: a call as the answer")
    if tools:
        texts[1 - asked] = f"{tools}\n\n{texts[1 - asked]}"  # the first of the user
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    texts = ["", *texts][-asked:]  # the system's first
    return {"turns": turns, "system": texts[0], "user": "\n\n".join(texts[1:]), "assistant": answer}


def _tools(cell: Any) -> str:
    """Tools as JSON, one a line; ValueError: they are no list of objects."""
    tools = from_json(cell) if isinstance(cell, str) and cell else cell or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"column tools: got {str(cell)[:80]!r}; allowed: a list of tools")
    return "\n".join(map(json_of, tools))


def _call(message: Row) -> str:
    """The calls of tools in a message as JSON, several as a list; empty: there are none."""
    cell = [message["function_call"]] if message.get("function_call") else message.get("tool_calls") or []
    listed = cell if isinstance(cell, list) else [cell]
    functions = [call.get("function", call) if isinstance(call, dict) else {} for call in listed]
    calls = [{key: function.get(key) for key in ("name", "arguments")} for function in functions]
    for call in calls:
        if isinstance(call["arguments"], str):
            call["arguments"] = from_json(call["arguments"] or "{}")
    if not all(map(calls_of, calls)):
        raise ValueError(f"column messages: got the call {str(cell)[:80]}; allowed: a name, and arguments as an object")
    return json_of(calls if len(calls) > 1 else calls[0]) if calls else ""


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
        return json.loads(text, parse_constant=int)  # which refuses NaN and Infinity: they are no JSON
    except (ValueError, RecursionError):
        return None


def json_of(value: Any) -> str:
    """A value as JSON in one line; empty: it has none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError):
        return ""


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


def accepted(answer: Any, kind: Kind = "written") -> tuple[str, ...]:
    """The texts that a written answer may be: one, a list (also as JSON), or `text` in a table, as in SQuAD.

    Of the kinds json and call, a list of JSON texts is several answers, anything else one.
    """
    if kind != "written":
        texts = [told if isinstance(told, str) else json_of(told) for told in _listed(answer)]
        is_kind = all(calls_of(from_json(text)) if kind == "call" else from_json(text) is not None for text in texts)
        return tuple(dict.fromkeys(text.strip() for text in texts)) if is_kind else ()
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
    short = all(len(text) <= LONGEST_LABEL and "\n" not in text and text[:1] not in ("{", "[") for text in counts)
    return short and ROWS_A_LABEL * different <= rows and different <= (MOST_NUMBERS if numbers else MOST_LABELS)


def _listed(answer: Any) -> list[Any]:
    """The answers that a cell holds: of a list of JSON texts (also as JSON) several, of anything else one."""
    value = from_json(answer) if isinstance(answer, str) else answer
    texts = value if isinstance(value, list) and all(isinstance(text, str) for text in value) else []
    return texts if texts and all(isinstance(from_json(text), dict | list) for text in texts) else [answer]


def calls_of(value: Any) -> list[dict[str, Any]]:
    """The calls of tools that a value is, one or a list of them; empty: it is something else."""
    calls = value if isinstance(value, list) else [value]
    types = [{name: type(part) for name, part in call.items()} if isinstance(call, dict) else {} for call in calls]
    return calls if all(parts == {"name": str, "arguments": dict} for parts in types) else []


def _kind_of_all(where: str, column: str, cells: Sequence[Any]) -> Kind:
    """The kind of written answers; InputError: they are of several."""
    first = dict[str, int]()
    for number, cell in enumerate(cells):
        if cell is not None and cell != "":  # such a row is refused when it is read
            first.setdefault(_what(cell), number)
    if len(first) > 1:
        shown = " and ".join(f"{what} in row {number}" for what, number in first.items())
        overruled = ', or kind = "written"' * all(isinstance(cells[number], str) for number in first.values())
        raise InputError(f"{where}: column {column}: got {shown}; allowed: answers of one kind{overruled}")
    return "call" if "a call" in first else "json" if "JSON" in first else "written"


def _what(answer: Any) -> str:
    """What an answer is, in words. A number is a text, and so is a list of texts that is written as JSON."""
    values = [from_json(told) if isinstance(told, str) else told for told in _listed(answer)]
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
        (common, _), *_ = counts.most_common(1)
        raise InputError(
            f"{where}: column {column}: got {once[0]!r} in row {values.index(once[0])} alone, beside labels such as "
            f'{common!r} in row {values.index(common)}; allowed: labels of two rows or more, or kind = "written"'
        )
    return tuple(sorted(counts))


def _limits(answers: Sequence[str], kind: Kind) -> dict[str, Any]:
    """What ends a written answer: tokens enough for the longest, and more line breaks than any has in a row.

    No line break ends JSON.
    """
    # Words of three letters and single other bytes are more than the tokens of any usual tokenizer.
    pieces = (len(re.findall(rb"[A-Za-z]{1,3}|[^A-Za-z ]", answer.encode())) for answer in answers)
    breaks = (len(found) for answer in answers for found in re.findall(r"\n+", answer.strip()))
    tokens = min(max(LEAST_TOKENS, max(pieces, default=0) + ROOM), 4096)
    stop = ("\n" * (1 + max(breaks, default=0)),) if kind == "written" else ()
    return {"max_new_tokens": tokens, "stop": stop}
