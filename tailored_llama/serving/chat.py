"""The prompt of a job in what is shipped: chat template, grammar and Modelfile; and how to ask for one answer."""

import json
import shlex
from pathlib import Path
from typing import Any

from tailored_llama.data import Chat
from tailored_llama.models import load_tokenizer

TEMPLATE, GRAMMAR = "chat_template.jinja", "grammar.gbnf"


def write_chat_template(folder: Path, chat: Chat) -> None:
    """Give a checkpoint the chat template of a job in place of its own."""
    tokenizer = load_tokenizer(folder)
    has_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    (folder / TEMPLATE).unlink(missing_ok=True)  # it may be a link
    (folder / TEMPLATE).write_text(_jinja(chat, has_bos), encoding="utf-8")


def _jinja(chat: Chat, has_bos: bool) -> str:
    """A chat template that writes the prompt around the last message; a server strips the BOS that it would add twice.

    Reading the first message tells llama.cpp that system messages are provided for. It would else put their text into
    the user's message.
    """
    message = "messages[-1]['content']"
    text = f" + {message} + ".join(map(_jinja_string, chat.parts))
    if not chat.stop and not chat.parts[-1]:  # choices are ranked after a prompt without white space at its end
        text = f"({text}).rstrip()"
    return "{{ bos_token }}" * has_bos + "{% set unread = messages[0]['content'] %}{{ " + text + " }}"


def _jinja_string(text: str) -> str:
    escapes = {ord("\\"): "\\\\", ord("'"): "\\'", ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}
    return f"'{text.translate(escapes)}'"


def write_grammar(folder: Path, chat: Chat | None) -> None:
    """Write the grammar of the answers, if they are the same for all rows."""
    if chat and chat.answers:
        (folder / GRAMMAR).write_text(f"root ::= {_alternatives(chat.answers)}\n", encoding="utf-8")


def _alternatives(answers: tuple[str, ...]) -> str:
    return " | ".join(json.dumps(answer, ensure_ascii=False) for answer in answers)


def modelfile(file: str, chat: Chat | None = None, tokenizer: Any = None) -> str:
    """Ollama's Modelfile, with the prompt as template; an answer has no more tokens than the longest may have."""
    lines = [f"FROM ./{file}", "PARAMETER temperature 0"]
    if chat:
        # JSON's strings are Go's as well.
        parts = ["{{ " + json.dumps(part, ensure_ascii=False) + " }}" if part else "" for part in chat.parts]
        lines.append(f'TEMPLATE """{"{{ .Prompt }}".join(parts)}"""')
        lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in chat.stop]
        lengths = [len(tokenizer.encode(answer, add_special_tokens=False)) for answer in chat.answers]
        if most := max(lengths, default=chat.new_tokens):
            lines.append(f"PARAMETER num_predict {most}")
    return "\n".join(lines) + "\n"


def how_to_ask(name: str, chat: Chat | None, file: str | None = None) -> str:
    """The section of a card, in Markdown, on how to ask a model for one answer; `file`: it is a GGUF file."""
    if chat is None:
        whole = f"`llama-completion -no-cnv -m {file} -p …`, or a server's" if file else "a server's"
        return f"""## How to ask it

Its chat template is the base model's. Nothing was tuned or measured with that one, so a chat gives other answers. Give
it the whole prompt as it is, by {whole} `/v1/completions`."""
    serve, ask = _served(name, chat, file), _OLLAMA if file else _TRANSFORMERS
    told = {"name": name, "message": json.dumps(chat.message), "most": chat.new_tokens or 16}
    return f"""## How to ask it

The user's message is this, with the texts of a row in place of the braces:

```text
{chat.message}
```

The chat template writes the prompt around it. It reads the last message alone, and no system message. {serve}

{ask.format(**told)}"""


def _served(name: str, chat: Chat, file: str | None) -> str:
    """How to serve a model, and to ask the server."""
    messages, options = [{"role": "user", "content": chat.message}], dict[str, Any]()
    said = "Answers begin with a space."
    if chat.stop:
        options = {"stop": list(chat.stop), "max_tokens": chat.new_tokens}
    elif not file:
        options = {"structured_outputs": {"choice": list(chat.choices)}}
    elif not chat.answers:
        options = {"grammar": f"root ::= {_alternatives(chat.choices)}"}
    if not chat.stop:
        said += " The choice goes token by token; what was measured compares whole answers."
    if not chat.stop and not chat.answers:
        said += " The choices of a row go with it, in place of the two below."
    grammar = f" --grammar-file {GRAMMAR}" if file and chat.answers else ""
    server = f"llama-server -m {file} --port 8000{grammar}" if file else "vllm serve path/to/this/folder"
    extra = f", extra_body={options!r}" if options else ""
    body = json.dumps({"messages": messages, "temperature": 0, **options}, ensure_ascii=False)
    return f"""{said}

```sh
{server}
curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" -d {shlex.quote(body)}
```

The same with the client of OpenAI (the tests of tailored-llama do not run it, nor {"Ollama" if file else "vLLM"}):

```python
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
asked = {messages!r}
answer = client.chat.completions.create(model={name!r}, messages=asked, temperature=0{extra})
print(answer.choices[0].message.content)
```"""


_OLLAMA = """With [Ollama](https://ollama.com), from this folder:

```sh
ollama create {name} -f Modelfile
ollama run {name} {message}
```"""
_TRANSFORMERS = """With transformers, where nothing limits the answers to the given ones:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
asked = tokenizer.apply_chat_template(
    [{{"role": "user", "content": {message}}}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
written = model.generate(**asked, max_new_tokens={most}, do_sample=False)
print(tokenizer.decode(written[0, asked["input_ids"].shape[1] :]))
```"""
