"""The prompt of a job around one message: what a chat template writes, so that a chat asks what was tuned on."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tailored_llama.config import BenchmarkConfig, asks_turns, is_written, new_tokens, stop_strings
from tailored_llama.data.benchmarks import Example, headline_metric
from tailored_llama.data.builtin import BUILTIN
from tailored_llama.data.custom import named_columns

FILE = "chat.json"
LAYOUT = "{% set unread = messages[0]['content'] %}"  # in a chat template that writes a layout around one message
_START, _END = "\ue000", "\ue001"  # around a name; private characters, which stand in no layout
_BRACES = {ord(_START): "{", ord(_END): "}"}
_BRACED = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")  # a name in braces, or doubled braces, which are a layout's own
_SOURCES = {  # what is no column of a row, by its name; that of a form, after the form
    "messages user": "the text of the user in the `messages` of a row",
    "messages prompt": "the system message in the `messages` of a row, an empty line, and the text of the user",
    "alpaca prompt": "the column `instruction` of a row, then an empty line and `input`, unless that is empty",
    "first choice": "the first choice of a row",
    "second choice": "the next one, and so on",
}

Rendered = tuple[Sequence[str], Sequence[str]]  # contexts and continuations by choice


@dataclass(frozen=True)
class Chat:
    """A prompt in parts, between which the user's message stands, or by a base's template; and what may follow it."""

    parts: tuple[str, ...]
    message: str  # what of a row the message holds, with names in braces; braces of its own are doubled
    choices: tuple[str, ...]  # what may follow, likewise where it differs by row
    answers: tuple[str, ...]  # the choices, if they are the same for all rows
    stop: tuple[str, ...]  # what ends an answer of its own, beside the end of text
    new_tokens: int  # of an answer of its own, at most; 0: choices are ranked
    schema: dict[str, Any] | None = None  # of answers in JSON
    template: str = ""  # the base's chat template, as it is shipped
    end: str = ""  # the token that it writes after an answer
    form: str = ""  # of the rows, if they have one
    columns: str | tuple[str, ...] = "choices"  # of a row with the choices, where they differ by row
    metric: str = "acc"  # by which choices are ranked

    def message_in(self, context: str) -> str:
        """The user's message in a prompt of these parts, before choices without white space at its end."""
        return _between(self.parts, context if self.new_tokens else context.rstrip())

    @property
    def sources(self) -> dict[str, str]:
        """Where the texts of a message come from, by the names in its braces."""
        told = _SOURCES | {name.removeprefix(f"{self.form} "): source for name, source in _SOURCES.items()}
        return {name: told.get(name, f"the column `{name}` of a row") for name in names_of(self.message)}

    @property
    def shown(self) -> str:
        """What of a row the message holds, for people."""
        return filled(self.message, "{{{}}}".format)

    def with_words(self) -> "Chat":
        """A chat with words in place of names, as an example shows it. A card may be published: no row stands there."""
        message, *choices = (filled(text, "the words of the {}".format) for text in (self.message, *self.choices))
        return replace(self, message=message, choices=self.answers or tuple(choices))


def named_example(benchmark: BenchmarkConfig) -> Example:
    """An example with the marked names of its columns in place of their texts."""
    columns = named_columns(benchmark)
    if benchmark.name in BUILTIN:
        texts = {name: _marked(name) for name in BUILTIN[benchmark.name].fields}
    elif columns:
        texts = {"context": str(benchmark.context).format(**{name: _marked(name) for name in columns})}
    else:
        texts = {"context": _marked(str(benchmark.context))}
    if asks_turns(benchmark):
        texts["messages"] = json.dumps([{"role": "user", "content": _marked("user")}])
    choices = ("answer",) if is_written(benchmark) else ("first choice", "second choice")
    return Example(0, texts, tuple(map(_marked, choices)), 0)


def _marked(name: str) -> str:
    return f"{_START}{name}{_END}"


def names_of(text: str) -> list[str]:
    """The names in braces."""
    return [name for name in _BRACED.findall(text) if name]


def filled(text: str, value: Callable[[str], str]) -> str:
    """A text with values in place of the names in braces."""
    return _BRACED.sub(lambda found: value(found[1]) if found[1] else found[0][0], text)


def in_braces(text: str, doubled: bool = False) -> str:
    """A text of a named example with braces as marks, and its own braces `doubled`."""
    return (re.sub("([{}])", r"\1\1", text) if doubled else text).translate(_BRACES)


def find_chat(
    benchmark: BenchmarkConfig, named: Rendered, rows: Sequence[Rendered], is_ended: bool, **of_base: Any
) -> Chat | None:
    """The chat that asks a benchmark's rows as they are rendered: one message holds all that differs by row.

    `named` is the named example; choices that the model ends itself are the same for all rows; `of_base` is the base's
    chat template, if it asks, and the end of an answer. None: the text before the answer differs by choice.
    """
    asked, choices, form = named[0][0], tuple(in_braces(own, doubled=True) for own in named[1]), benchmark.form or ""
    if len(set(named[0])) > 1 or _START not in asked:
        return None
    first = next(iter(named_example(benchmark).fields.values()))
    for message in (_inside(first), _inside(asked)):  # the first field may stand there twice
        parts = tuple(asked.split(message)) if not of_base else ("",)
        if len(parts) > 1 and not any(_START in part for part in parts):
            break
    contexts = [context for contexts, _ in rows for context in contexts]
    if not of_base and any(_between(parts, context).join(parts) != context for context in contexts):
        return None
    message = in_braces(message, doubled=True)
    written, space = is_written(benchmark), parts[-1][len(parts[-1].rstrip()) :]
    if written:
        return Chat(parts, message, (), (), stop_strings(benchmark), new_tokens(benchmark), form=form, **of_base)
    # White space before an answer is scored with it, as `models.encode_pair` says.
    parts, choices = (*parts[:-1], parts[-1].rstrip()), tuple(space + choice for choice in choices)
    answers = tuple(space + answer for answer in dict.fromkeys(rows[0][1])) if is_ended and rows else ()
    of_base |= {"columns": benchmark.choices or "choices", "metric": headline_metric(benchmark)}
    return Chat(parts, message, answers or choices, answers, (), 0, form=form, **of_base)


def _inside(text: str) -> str:
    """A text from its first name to its last."""
    return text[text.index(_START) : text.rindex(_END) + 1]


def _between(parts: Sequence[str], context: str) -> str:
    """What stands between the parts of a context, everywhere the same."""
    size = (len(context) - sum(map(len, parts))) // (len(parts) - 1)
    return context[len(parts[0]) : len(parts[0]) + size]


def write_chat(out: Path, chat: Chat | None) -> None:
    fields = chat and {name: value for name, value in asdict(chat).items() if value or name not in ("template", "end")}
    (out / FILE).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def read_chat(*prompts: Path) -> Chat | None:
    """The chat that `write_chat` wrote to the folder of a model or of prompts, of one benchmark or several.

    None: there is none, or they do not share it.
    """
    files = [folder / FILE for folder in prompts]
    found = [json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None for file in files]
    if not found or any(chat != found[0] for chat in found):
        return None
    return found[0] and Chat(**{name: frozen(value) for name, value in found[0].items()})


def answer_end(prompts: Path) -> str:
    """The token after an answer, if the base's chat template asks these prompts; else empty."""
    chat = read_chat(prompts)
    return chat.end if chat else ""


def frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
