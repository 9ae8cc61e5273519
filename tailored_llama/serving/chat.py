"""The prompt of a job in what is shipped: chat template and grammar; and how to ask for one answer."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment

from tailored_llama.data import LAYOUT, Chat
from tailored_llama.models import load_tokenizer, special_around, with_end
from tailored_llama.serving.server import GRAMMAR, TEMPLATE

SCHEMA = "schema.json"


def write_chat_template(folder: Path, chat: Chat, tokenizer: Any = None) -> None:
    """Give a checkpoint the chat template of a job in place of its own; or another folder, with the tokenizer.

    A template of the base brings the end of an answer.
    """
    tokenizer = tokenizer or load_tokenizer(folder)
    if chat.template:
        _set(folder / "generation_config.json", "eos_token_id", tokenizer.convert_tokens_to_ids(chat.end))
        _set(folder / "tokenizer_config.json", "eos_token", chat.end)
    _write(folder / TEMPLATE, chat_template(chat, tokenizer))


def chat_template(chat: Chat, tokenizer: Any) -> str:
    """The chat template of a job, in Jinja."""
    return chat.template or _jinja(chat, bool(special_around(tokenizer, "a")[0]))


def _set(file: Path, name: str, value: Any) -> None:
    """Set a field of a file; a new token that ends what the model writes comes before those that do already."""
    stated = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if name == "eos_token_id":
        value = with_end(stated.get(name), value)
    _write(file, json.dumps(stated | {name: value}, indent=2, ensure_ascii=False))


def _write(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)  # it may be a link
    file.write_text(text, encoding="utf-8")


def _jinja(chat: Chat, has_bos: bool) -> str:
    """A chat template that writes the prompt around the last message; a server strips the BOS that it would add twice.

    Reading the first message tells llama.cpp that system messages are provided for. It would else put their text into
    the user's message.
    """
    message = "messages[-1]['content']"
    text = f" + {message} + ".join(map(_jinja_string, chat.parts))
    if not chat.new_tokens and not chat.parts[-1]:  # choices are ranked after a prompt without white space at its end
        text = f"({text}).rstrip()"
    return "{{ bos_token }}" * has_bos + LAYOUT + "{{ " + text + " }}"


def _jinja_string(text: str) -> str:
    escapes = {ord("\\"): "\\\\", ord("'"): "\\'", ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}
    return f"'{text.translate(escapes)}'"


def write_grammar(folder: Path, chat: Chat) -> None:
    """Write the grammar of the answers, if they are the same for all rows."""
    if chat.answers:
        (folder / GRAMMAR).write_text(grammar_of(chat.answers) + "\n", encoding="utf-8")


def grammar_of(answers: Sequence[str]) -> str:
    """A grammar of llama.cpp that allows these answers alone."""
    return "root ::= " + " | ".join(json.dumps(answer, ensure_ascii=False) for answer in answers)


def write_schema(folder: Path, chat: Chat) -> None:
    """Write the JSON schema of the answers, if they are JSON."""
    if chat.schema:
        (folder / SCHEMA).write_text(json.dumps(chat.schema, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def shipped_chat(chat: Chat, folder: Path) -> Chat:
    """A chat with what limits the answers in a folder: the schema there, and the same answers if a grammar is there."""
    schema = json.loads(file.read_text(encoding="utf-8")) if (file := folder / SCHEMA).is_file() else None
    return replace(chat, schema=schema, answers=chat.answers if (folder / GRAMMAR).is_file() else ())


def written_options(stop: Sequence[str], new_tokens: int, schema: Any) -> dict[str, Any]:
    """What goes with the request of a written answer: what ends it, and the schema of one in JSON."""
    options: dict[str, Any] = {"stop": [*stop]} if stop else {}
    options["max_tokens"] = new_tokens
    if schema:
        options["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return options


def curl_call(chat: Chat, file: Path | None, url: str) -> str:
    """The command that asks a server an example; `file`: the server has a GGUF file."""
    chat = chat.with_words()
    asked = {"messages": [{"role": "user", "content": chat.message}], "temperature": 0} | _options(chat, file)
    body = shlex.quote(json.dumps(asked, ensure_ascii=False))
    return f'curl {url}/v1/chat/completions -H "Content-Type: application/json" -d {body}'


def _options(chat: Chat, file: Path | None) -> dict[str, Any]:
    """What goes with the messages of a request."""
    if chat.new_tokens:
        return written_options(chat.stop, chat.new_tokens, chat.schema)
    if not file:
        return {"structured_outputs": {"choice": list(chat.choices)}}
    return {} if chat.answers else {"grammar": grammar_of(chat.choices)}


def how_to_ask(name: str, chat: Chat | None, file: Path | None = None) -> str:
    """The section of a card, in Markdown, on how to ask a model for one answer; `file`: it is a GGUF file."""
    values: dict[str, Any] = {"name": name, "chat": chat, "file": file and file.name}
    values["port"] = port = 8080 if file else 8000  # of llama-server and of vllm, unless they are told
    values["beside"] = bool(file and file.with_name(TEMPLATE).is_file())
    if chat:
        shown = chat.with_words()
        values |= {"messages": [{"role": "user", "content": shown.message}], "options": _options(shown, file)}
        values["curl"] = curl_call(chat, file, f"http://127.0.0.1:{port}")
    template = (Path(__file__).parent / "templates" / "how_to_ask.md.j2").read_text(encoding="utf-8")
    return Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(values).strip()
