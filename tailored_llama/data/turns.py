"""Messages in the words of a base model's own chat template, and what of it is shipped."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailored_llama import models
from tailored_llama.config import BenchmarkConfig, asks_turns
from tailored_llama.data.chat import LAYOUT
from tailored_llama.errors import InputError, one_line

_ANSWER = "\ue000"  # a private character, which stands in no template


@dataclass(frozen=True)
class Turns:
    """A chat template that asks rows of messages, and what it writes around an answer."""

    tokenizer: Any
    template: str  # as it is shipped
    delimiter: str = ""  # white space before an answer
    end: str = ""  # the token after it

    def ask(self, where: str, messages: Sequence[Mapping[str, str]], is_asked: bool = True) -> str:
        """The prompt of messages, or only these; InputError, which begins with `where`: the template refuses them."""
        options = {"chat_template": self.template, "tokenize": False, "add_generation_prompt": is_asked}
        try:
            return str(self.tokenizer.apply_chat_template([*messages], **options))
        except Exception as error:  # of many types, as the template decides
            allowed = "messages that the base's chat template takes"
            raise InputError(f"{where}: got {one_line(error)!r} from the chat template; allowed: {allowed}") from None


def find_turns(base: Any, benchmark: BenchmarkConfig) -> Turns | None:
    """The chat template of a tokenizer, or of a checkpoint's, as it asks rows of messages and is shipped.

    The benchmark's instruction becomes the system message of chats without one. The template writes the BOS token where
    the tokenizer would add it, and always the same date. None: the rows are no messages, or there is no such template,
    or a layout in its place.

    Raises:
        InputError: the template refuses the instruction, or an answer has no end.
    """
    tokenizer = models.load_tokenizer(base) if asks_turns(benchmark) and isinstance(base, Path) else base
    if not asks_turns(benchmark) or not (tokenizer and tokenizer.chat_template):
        return None
    template = re.sub(r"strftime_now\([^)]*\)", "'26 Jul 2024'", tokenizer.get_chat_template())  # Llama's default
    if LAYOUT in template:
        return None
    if benchmark.instruction:
        system = f"{{'role': 'system', 'content': {json.dumps(benchmark.instruction, ensure_ascii=False)}}}"
        given = f"{{% set messages = [{system}] + messages %}}"
        default = f"{{% if messages[0]['role'] != 'system' %}}{given}{{% endif %}}"
        template = template if default in template else default + template  # that of a shipped model has it already
    where, asked, ids = f"benchmarks.{benchmark.name}", [{"role": "user", "content": "a"}], tokenizer("a")["input_ids"]
    prompt = Turns(tokenizer, template).ask(where, asked)
    if tokenizer.bos_token_id in ids[:1] and not prompt.startswith(tokenizer.bos_token):
        template, prompt = "{{ bos_token }}" + template, tokenizer.bos_token + prompt
    given = Turns(tokenizer, template).ask(where, [*asked, {"role": "assistant", "content": _ANSWER}], False)
    before, _, after = given.partition(_ANSWER)
    delimiter = before.removeprefix(prompt)
    if delimiter and not delimiter.isspace():  # it writes more before an answer that is given than before one to come
        delimiter = "" if prompt[-1:].isspace() else " "
    added, ids = tokenizer.added_tokens_decoder, tokenizer.encode(after, add_special_tokens=False)
    ends = [str(added[i]) for i in ids if i in added and added[i].special] or [tokenizer.eos_token]
    if not (end := tokenizer.eos_token if tokenizer.eos_token in ends else ends[0]):
        raise InputError(f"{where}: got a chat template without an end of answers; allowed: one with it, or EOS")
    return Turns(tokenizer, template, delimiter, end)
