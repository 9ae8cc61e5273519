"""What llama.cpp itself answers with the GGUF file that is shipped; and how any server is asked the same."""

import json
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tailored_llama.config import Work
from tailored_llama.data import Chat, Prompt, encode_prompt, read_chat, read_prompts
from tailored_llama.evaluation import ScoreSettings, facts_of, write_choices, write_texts
from tailored_llama.models import encode, load_tokenizer, open_gguf, read_config
from tailored_llama.serving.chat import chat_template, grammar_of, shipped_chat, written_options
from tailored_llama.serving.client import ChatServer, Reply, ask_all
from tailored_llama.serving.gguf_writing import gguf_file
from tailored_llama.serving.llama_cpp import file_loglikelihoods
from tailored_llama.serving.server import TEMPLATE, llama_server

ROOM = 64  # tokens of a chat beyond the prompt and the answer that were counted


def score_served(checkpoint: Path, gguf: Path, prompts: Path, *, settings: ScoreSettings, work: Work) -> dict[str, Any]:
    """Stage: score a GGUF file by what llama.cpp answers with it; write what `score_benchmark` writes.

    Labels and written answers are those of its server for the ordinary chat call at temperature 0, with the grammar
    beside the file. If the file's chat template is not that of the rows, as with several jobs in one file, the server
    is given the prompt itself. A row that is longer than the model's context has no answer, which is wrong. Choices
    that differ by row are ranked by their log-likelihoods; there a long row loses its start. `metrics.json` also says
    how llama.cpp was asked (`served`), and the bytes of the file.

    `checkpoint` has the tokenizer, and the length of the context.
    """
    rows, file = read_prompts(prompts, settings.split), gguf_file(gguf)
    tokenizer, limit = load_tokenizer(checkpoint), int(read_config(checkpoint)["max_position_embeddings"])
    template, chat, replies, allowed = _template_of(file), read_chat(prompts), list[Reply](), None
    if not (is_written := rows[0].is_ended):
        encoded = [encode_prompt(tokenizer, prompt, limit) for prompt in rows]
        result = write_choices(rows, file_loglikelihoods(file, encoded, work.progress), [], work.out)
        asked, package = "log-likelihoods", "llama-cpp-py-sync"
    else:
        chat = shipped_chat(chat, file.parent) if chat and chat_template(chat, tokenizer) == template else None
        requests = requests_of(rows, settings, chat, tokenizer.bos_token or "")
        tokens = max(len(encode(tokenizer, prompt.contexts[0])) for prompt in rows) + max(
            own["max_tokens"] for own in requests
        )
        with llama_server(file, min(limit, tokens + ROOM), torch.get_num_threads()) as (url, _):
            replies = ask_all(ChatServer(url), requests, work.progress)
        result = write_answers(rows, replies, settings, work.out)
        allowed = chat and chat.schema if settings.written else [*map(str.strip, rows[0].continuations)]
        asked, package = "chat" if chat else "prompt", "xllamacpp"
    served = {
        "asked": asked,
        "runtime": f"llama.cpp of {package} {version(package)}",
        "template": sha256(template.encode()).hexdigest() if template else None,
        "unended": unended(replies),
    }
    facts = facts_of(settings, rows, "llama.cpp", is_written, allowed) | {"served": served}
    (work.out / "metrics.json").write_text(json.dumps(facts | result | {"bytes": file.stat().st_size}, indent=1) + "\n")
    return {"examples": len(rows), "asked": asked}


def _template_of(file: Path) -> str | None:
    """The chat template that a server gives a GGUF file: the one beside it, or else its own."""
    if (beside := file.with_name(TEMPLATE)).is_file():
        return beside.read_text(encoding="utf-8")
    field = open_gguf(file, file.name).fields.get("tokenizer.chat_template")
    return field and str(field.contents())


def requests_of(rows: Sequence[Prompt], score: ScoreSettings, chat: Chat | None, bos: str = "") -> list[dict[str, Any]]:
    """What asks a server for the answer to each row: in a chat or, without one, by the prompt itself.

    The choices go with a row, as llama.cpp and as vLLM read them. llama.cpp's server has the `answers` of a chat
    already: they are its grammar file.
    """

    def request(prompt: Prompt) -> dict[str, Any]:
        # White space at the end is asked of the model before choices, unless a base's chat template writes it.
        context = prompt.contexts[0] if score.written or prompt.end else prompt.contexts[0].rstrip()
        body: dict[str, Any] = {"prompt": context.removeprefix(bos)}  # which the server adds
        if chat:
            said = [{"role": "user", "content": chat.message_in(context)}] if not prompt.messages else None
            body = {"messages": said or json.loads(prompt.messages)}
        if written := score.written:
            return body | written_options(written.stop, written.max_new_tokens, chat and chat.schema)
        choices = [prompt.contexts[0][len(context) :] + answer for answer in prompt.continuations]
        body["max_tokens"] = 1 + max(len(choice.encode()) for choice in choices)  # a token has a byte at least
        body["structured_outputs"] = {"choice": choices}
        return body if chat and chat.answers else body | {"grammar": grammar_of(choices)}

    return [request(prompt) for prompt in rows]


def unended(replies: Sequence[Reply]) -> int:
    """How many answers only the limit of tokens ended."""
    return sum(reply.ended == "length" for reply in replies)


def write_answers(
    rows: Sequence[Prompt], replies: Sequence[Reply], score: ScoreSettings, out: Path
) -> dict[str, float]:
    """Write what `score_benchmark` writes of what a server wrote, and return its metrics; -1 is none of the choices."""
    texts = [reply.text for reply in replies]
    if score.written:
        return write_texts(rows, texts, score, out)
    choices = [[answer.strip() for answer in prompt.continuations] for prompt in rows]
    picked = [own.index(text.strip()) if text.strip() in own else -1 for own, text in zip(choices, texts, strict=True)]
    return write_choices(rows, [()] * len(rows), picked, out)
