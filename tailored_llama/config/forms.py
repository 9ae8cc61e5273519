"""Rows of the user's own: the forms that they have, and what their answers are."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tailored_llama.errors import InputError

Form = Literal["messages", "alpaca"]
Kind = Literal["labels", "choices", "written", "json", "call"]
Metric = Literal["acc", "acc_norm", "exact_match", "f1", "json", "tool_call"]  # each with its kinds in `METRICS`
Row = Mapping[str, Any]

MESSAGES = ("messages", "conversations")  # ShareGPT's name is the latter
ALPACA = ("system", "instruction", "input", "context")  # Dolly's name for the input is the last
ROLES = {"developer": "system", "human": "user", "gpt": "assistant"}  # as OpenAI and ShareGPT call them, too

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
PASSAGES = ("passage", "context", "document", "article", "paragraph")
TEXTS = ("text", "sentence", "review", "content", "message", "input", "query", *PASSAGES)
LABELS = ("label", "category", "class", "intent", "topic", "sentiment")
METRICS: dict[Kind, tuple[Metric, ...]] = {  # kind → its metrics; the first of a written kind is its default
    **dict.fromkeys(("labels", "choices"), ("acc", "acc_norm")),
    "written": ("exact_match", "f1"),
    "json": ("json",),
    "call": ("tool_call",),
}
# The metrics of answers that the model writes → their kinds
WRITTEN: dict[Any, Kind] = {metric: kind for kind in ("written", "json", "call") for metric in METRICS[kind]}

# What stands for the answer of a row that has none
UNKNOWN: dict[Any, Any] = {"choices": 0, "written": "?", "json": "{}", "call": '{"name": "", "arguments": {}}'}

# Answers that nothing calls labels are labels if there are few of them, and each has several rows. Numbers are counted
# more strictly, since the sums of small numbers come again as well.
MOST_LABELS, MOST_NUMBERS, LONGEST_LABEL, ROWS_A_LABEL = 200, 10, 100, 5
LONG_TEXT = 40  # characters, on average


def as_benchmark(value: Any) -> Any:
    """A benchmark's table; a text is the name of a benchmark, or the path of a file that holds one.

    InputError: it is the path of something else.
    """
    if not isinstance(value, str):
        return value
    if is_row_file(value):
        return {"data": value}
    if "://" not in value and (Path(value).suffix or "/" in value or "\\" in value):
        raise InputError(f"benchmarks: got {value!r}; allowed: a {', '.join(SUFFIXES)} file, or a benchmark's name")
    return {"name": value}


def is_row_file(path: str) -> bool:
    """Tell by its name whether a file has rows."""
    return Path(path).suffix.lower() in SUFFIXES


def form_of(row: Row, is_asked: bool = False) -> Form | None:
    """The form of a row by its columns, or by those of a question alone. A prompt that is messages is TRL's."""
    cells = {column.lower(): value for column, value in row.items()}
    prompt = cells.get("prompt")
    turns = from_json(prompt) if isinstance(prompt, str) else prompt
    has_turns = isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    if "messages" in cells or _listed(cells) or (has_turns and turns and (is_asked or "completion" in cells)):
        return "messages"
    return "alpaca" if "instruction" in cells and (is_asked or {"output", "response"} & cells.keys()) else None


def columns_in(form: Form, columns: Iterable[str]) -> set[str]:
    """The columns that rows in a form are read from."""
    names = {column.lower(): column for column in columns}
    if form == "alpaca":
        read = [*ALPACA, next((name for name in ("output", "response") if name in names), "")]
    else:
        listed = next((name for name in MESSAGES if name in names), None)
        read = ["system", "tools", "functions", *((listed,) if listed else ("prompt", "completion"))]
    return {names[name] for name in read if name in names}


def in_form(rows: Sequence[Row], form: Form, where: str, unanswered: bool = False) -> list[dict[str, Any]]:
    """Rows with the columns that a form stands for; InputError: a row has another form, after `where`.

    If rows may be `unanswered`, the answer of such a row is None.

    messages: `turns`, those before the answer; `system`; `user`, the texts of all others, after the tools; `assistant`,
    the answer; and `prompt`, all but the answer. alpaca: `output` (or Dolly's `response`), and `prompt`: a system text,
    the instruction, and any input or context.
    """
    shaped = []
    for number, row in enumerate(rows):
        cells = {column.lower(): value for column, value in row.items()}
        try:
            cell = cells.get("history")
            history = from_json(cell) if isinstance(cell, str) else cell
            if form == "alpaca" and isinstance(history, list) and history:
                raise ValueError(f"column history: got {history!r:.80}; allowed: none, or all turns as messages")
            told = (
                _turns(cells, unanswered)
                if form == "messages"
                else {"output": cells.get("output", cells.get("response"))}
            )
        except ValueError as error:
            raise InputError(f"{where} row {number}: {error}") from None
        parts = ("system", "user") if form == "messages" else ALPACA
        texts = [text for part in parts if isinstance(text := (cells | told).get(part), str) and text.strip()]
        shaped.append({**row, **told, "prompt": "\n\n".join(texts)})
    return shaped


def _turns(cells: Row, unanswered: bool) -> dict[str, Any]:
    """The messages of a row, and their texts; ValueError: they are no words, or not questions with answers in turn."""
    listed = _listed(cells) or ("messages" if "messages" in cells else None)
    messages, where = _messages(cells, listed), f"column {listed}" if listed else "columns prompt and completion"
    roles = [str(message["role"]) for message in messages]
    if unanswered and roles[-1:] == ["user"]:
        unknown = {"role": "assistant", "content": UNKNOWN["call"]}
        return _turns({**cells, listed or "messages": [*messages, unknown]}, False) | {"assistant": None}
    asked = len(roles) - (roles[:1] == ["system"])
    if not asked or roles[-asked:] != ["user", "assistant"] * (asked // 2):
        allowed = "system (or none), then user and assistant in turn, assistant last"
        raise ValueError(f"{where}: got the roles {', '.join(roles) or 'of none'}; allowed: {allowed}")
    if any(message.get("tool_calls") or message.get("function_call") for message in messages[:-1]):
        raise ValueError(f"{where}: got a call before the last message; allowed: a call as the answer")
    call, tools = _call(where, messages[-1]), _tools(cells.get("tools") or cells.get("functions"))
    contents = [message.get("content") for message in messages[:-1]] + [call or messages[-1].get("content")]
    *texts, answer = (_words(where, role, content) for role, content in zip(roles, contents, strict=True))
    if tools and not calls_of(from_json(answer)):
        raise ValueError(f"got tools and the answer {answer!r:.80}; allowed: a call as the answer")
    if tools:
        texts[1 - asked] = f"{tools}\n\n{texts[1 - asked]}"  # the first of the user
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    texts = ["", *texts][-asked:]  # the system's first
    return {"turns": turns, "system": texts[0], "user": "\n\n".join(texts[1:]), "assistant": answer}


def _listed(cells: Row) -> str | None:
    """The column with the messages of a row."""
    return next((name for name in MESSAGES if isinstance(cells.get(name), list | str)), None)


def _messages(cells: Row, listed: str | None) -> list[dict[str, Any]]:
    """The messages in a column, or of prompt and completion, without an empty system message first.

    ValueError: a cell is no list of messages.
    """
    messages = list[dict[str, Any]]()
    for column in (listed,) if listed else ("prompt", "completion"):
        cell = cells.get(column)
        part = from_json(cell) if isinstance(cell, str) else cell
        if column == "completion" and not is_answered(cell):
            continue
        if not isinstance(part, list) or not all(isinstance(message, dict) for message in part):
            raise ValueError(f"column {column}: got {cell!r:.80}; allowed: a list of messages")
        messages += part
    roles = [str(m.get("role", m.get("from"))).lower() for m in messages]
    messages = [
        {**m, "role": ROLES.get(role, role), "content": m.get("content", m.get("value"))}
        for m, role in zip(messages, roles, strict=True)
    ]
    if isinstance(system := cells.get("system"), str) and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    is_told = not messages or messages[0]["role"] != "system" or is_answered(messages[0].get("content"))
    return messages if is_told else messages[1:]


def _tools(cell: Any) -> str:
    """Tools as JSON, one a line; ValueError: they are no list of objects."""
    tools = from_json(cell) if isinstance(cell, str) and cell else without_nulls(cell or [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"column tools: got {cell!r:.80}; allowed: a list of tools")
    return "\n".join(map(json_of, tools))


def _call(where: str, message: Row) -> str:
    """The calls of tools in a message as JSON, several as a list; empty: there are none."""
    cell = [message["function_call"]] if message.get("function_call") else message.get("tool_calls") or []
    listed = cell if isinstance(cell, list) else [cell]
    functions = [call.get("function", call) if isinstance(call, dict) else {} for call in listed]
    calls = [{key: function.get(key) for key in ("name", "arguments")} for function in functions]
    for call in calls:
        told = call["arguments"]
        call["arguments"] = from_json(told or "{}") if isinstance(told, str) else without_nulls(told)
    if not all(map(calls_of, calls)):
        raise ValueError(f"{where}: got the call {cell!r:.80}; allowed: a name, and arguments as an object")
    return json_of(calls if len(calls) > 1 else calls[0]) if calls else ""


def without_nulls(value: Any) -> Any:
    """A nested value without the fields that are None: in Parquet, every row has the fields of all."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _words(where: str, role: str, content: Any) -> str:
    """The content of a message as text."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts) or not "".join(map(str, texts)).strip():
        raise ValueError(f"{where}: got {content!r:.80} from {role}; allowed: a text")
    return "".join(map(str, texts))


def is_answered(cell: Any) -> bool:
    """Return whether a cell has an answer."""
    return cell is not None and cell == cell and (not isinstance(cell, str) or bool(cell.strip()))


def from_json(text: str, parse_float: Callable[[str], float] = float) -> Any:
    """The value of a text in JSON; None: it is another text."""
    try:  # `int` refuses NaN and Infinity: they are no JSON
        return json.loads(text, parse_float=parse_float, parse_constant=int)
    except (ValueError, RecursionError):
        return None


def json_of(value: Any) -> str:
    """A value as JSON in one line; empty: it has none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError):
        return ""


def accepted(answer: Any, kind: Kind = "written") -> tuple[str, ...]:
    """The texts that a written answer may be: one, a list (also as JSON), or `text` in a table, as in SQuAD.

    Of the kinds json and call, a list of JSON texts is several answers, anything else one.
    """
    if kind != "written":
        texts = [told if isinstance(told, str) else json_of(told) for told in answers_in(answer)]
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


def is_long_text(cells: Iterable[str], rows: int) -> bool:
    """Decide whether the texts of so many rows are long and mostly differ. One word, such as an address, is no text."""
    texts = [text for cell in cells if not (text := cell.strip()).isascii() or len(text.split()) > 1]
    return bool(texts) and 2 * len({*texts}) >= rows and sum(map(len, texts)) >= LONG_TEXT * len(texts)


def answers_in(answer: Any) -> list[Any]:
    """The answers that a cell holds: of a list of JSON texts (also as JSON) several, of anything else one."""
    value = from_json(answer) if isinstance(answer, str) else answer
    texts = value if isinstance(value, list) and all(isinstance(text, str) for text in value) else []
    return texts if texts and all(isinstance(from_json(text), dict | list) for text in texts) else [answer]


def calls_of(value: Any) -> list[dict[str, Any]]:
    """The calls of tools that a value is, one or a list of them; empty: it is something else."""
    calls = value if isinstance(value, list) else [value]
    types = [{name: type(part) for name, part in call.items()} if isinstance(call, dict) else {} for call in calls]
    return calls if all(parts == {"name": str, "arguments": dict} for parts in types) else []
