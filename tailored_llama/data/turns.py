"""Messages in the words of a base model's own chat template, and what of it is shipped."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from tailored_llama.config import BenchmarkConfig, asks_turns, is_written, new_tokens, stop_strings
from tailored_llama.data.benchmarks import Example
from tailored_llama.data.chat import LAYOUT, Chat, Rendered, in_braces, named_example, shared_answers
from tailored_llama.errors import InputError, one_line

_ANSWER = "\ue000"  # a private character, which stands in no template
_DATED, _DAY = re.compile(r"""strftime_now\((["'])(.*?)\1\)"""), date(2024, 7, 26)  # Llama's own default


@dataclass(frozen=True)
class Turns:
    """A chat template that asks rows of messages, and what it writes around an answer."""

    tokenizer: Any
    template: str  # as it is shipped
    delimiter: str = ""  # white space before an answer
    end: str = ""  # the token after it

    def ask(self, where: str, messages: Sequence[Mapping[str, str]], is_asked: bool = True) -> str:
        """The prompt of messages, or these alone; InputError, which begins with `where`: the template refuses them."""
        options = {"chat_template": self.template, "tokenize": False, "add_generation_prompt": is_asked}
        try:
            return str(self.tokenizer.apply_chat_template([*messages], **options))
        except Exception as error:  # of many types, as the template decides
            allowed = "messages that the base's chat template takes"
            raise InputError(f"{where}: got {one_line(error)!r} from it; allowed: {allowed}") from None


def find_turns(tokenizer: Any, benchmark: BenchmarkConfig) -> Turns | None:
    """The chat template of a tokenizer, with the benchmark's instruction as the system message of chats without one.

    It writes the BOS token if the tokenizer would add it, and always the same date. None: the rows are no messages, or
    the tokenizer has no such template, or one that was shipped with a layout.

    Raises:
        InputError: the template refuses the system message, or its date cannot be fixed; or an answer has no end.
    """
    if not asks_turns(benchmark) or not tokenizer.chat_template or LAYOUT in tokenizer.get_chat_template():
        return None
    where, asked = f"benchmarks.{benchmark.name}: chat template", [{"role": "user", "content": "a"}]
    template = _DATED.sub(lambda found: json.dumps(_DAY.strftime(found[2])), tokenizer.get_chat_template())
    if "strftime_now(" in template:
        raise InputError(f"{where}: got a date in a form that it computes; allowed: strftime_now('…')")
    if benchmark.instruction:
        system = f"{{'role': 'system', 'content': {json.dumps(benchmark.instruction, ensure_ascii=False)}}}"
        given = f"{{% set messages = [{system}] + messages %}}"
        template = f"{{% if messages[0]['role'] != 'system' %}}{given}{{% endif %}}{template}"
    turns, ids = Turns(tokenizer, template), tokenizer("a")["input_ids"]
    prompt = turns.ask(where, asked)
    adds_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    if adds_bos and not prompt.startswith(tokenizer.bos_token):
        turns = replace(turns, template="{{ bos_token }}" + template)
        prompt = turns.ask(where, asked)
    before, _, after = turns.ask(where, [*asked, {"role": "assistant", "content": _ANSWER}], False).partition(_ANSWER)
    between = before.removeprefix(prompt)
    if between and not between.isspace():  # it writes more before an answer that is given than before one to come
        between = "" if prompt[-1:].isspace() else " "
    added = tokenizer.added_tokens_decoder
    names = (
        str(added[i]) for i in tokenizer.encode(after, add_special_tokens=False) if i in added and added[i].special
    )
    if not (end := next(names, tokenizer.eos_token)):
        raise InputError(f"{where}: got no token after an answer; allowed: one, or an end of text")
    if end != tokenizer.eos_token and tokenizer.eos_token and "eos_token" in template:  # the end becomes that of text
        before = f"{{% set eos_token = {json.dumps(tokenizer.eos_token, ensure_ascii=False)} %}}"
        turns = replace(turns, template=before + turns.template)
    return replace(turns, delimiter=between, end=end)


def turns_chat(benchmark: BenchmarkConfig, turns: Turns, rows: Sequence[Rendered]) -> Chat:
    """The chat that asks rows by the chat template of their base."""
    template: dict[str, Any] = {"template": turns.template, "end": turns.end}
    if is_written(benchmark):
        return Chat((), "{user}", (), (), stop_strings(benchmark), new_tokens(benchmark), **template)
    answers, named = shared_answers(rows), named_example(benchmark).choices
    choices = answers or tuple(turns.delimiter + in_braces(choice) for choice in named)
    return Chat((), "{user}", choices, answers, (), 0, **template)


def messages_of(example: Example) -> list[dict[str, str]]:
    """The messages before an answer; empty if the row was none."""
    return list(json.loads(example.fields.get("messages", "[]")))


def check_one_turn(where: str, example: Example) -> None:
    """Check that a layout can be written around the messages before an answer."""
    roles = [message["role"] for message in messages_of(example)]
    if roles.count("user") > 1:
        raise InputError(
            f"{where} example {example.index}: got {len(roles)} messages before the answer; allowed: one of the user "
            "(and a system message), as the base model has no chat template"
        )
