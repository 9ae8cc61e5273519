"""What llama.cpp itself answers with the GGUF file that is shipped."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from tailored_llama.config import BenchmarkConfig, Work
from tailored_llama.data import Chat, Prompt, PromptSplit, encode_prompt, read_chat, read_prompts
from tailored_llama.evaluation import ScoreSettings, predict, write_choices, write_texts
from tailored_llama.models import encode, load_tokenizer, read_config
from tailored_llama.progress import Progress, silent
from tailored_llama.serving.chat import SCHEMA, grammar_of, written_options
from tailored_llama.serving.client import ChatServer, Refused, Reply
from tailored_llama.serving.gguf_writing import gguf_file
from tailored_llama.serving.llama_cpp import file_loglikelihoods
from tailored_llama.serving.server import llama_server

LONGEST_LABEL = 256  # tokens; a grammar ends it
ROOM = 64  # tokens of a chat beyond the prompt that was counted
TOO_LONG = "exceed_context_size_error"


@dataclass(frozen=True)
class ServedSettings:
    """How a GGUF file is scored in llama.cpp; `ranked`: by log-likelihoods of the choices in any case."""

    score: ScoreSettings
    ranked: bool = False

    @classmethod
    def of(cls, benchmark: BenchmarkConfig, split: PromptSplit, ranked: bool = False) -> Self:
        return cls(ScoreSettings.of(benchmark, split), ranked)


def score_served(
    checkpoint: Path, gguf: Path, prompts: Path, *, settings: ServedSettings, work: Work
) -> dict[str, Any]:
    """Stage: score a GGUF file by what llama.cpp answers with it; write what `score_benchmark` writes.

    Labels and written answers are those of its server for the ordinary chat call at temperature 0, with the grammar
    beside the file. If the file's chat template writes another prompt than that of the rows, the server is given the
    prompt itself. A row that is longer than the model's context has no answer, which is wrong. Choices that differ by
    row are ranked by their log-likelihoods; there a long row loses its start. `metrics.json` also says how llama.cpp
    was asked, its version, and the SHA-256 of the chat template.

    `checkpoint` has the tokenizer, and the length of the context.
    """
    rows, score, file = read_prompts(prompts, settings.score.split), settings.score, gguf_file(gguf)
    tokenizer, limit = load_tokenizer(checkpoint), int(read_config(checkpoint)["max_position_embeddings"])
    if settings.ranked or not (score.written or _have_common_answers(rows)):
        encoded = [encode_prompt(tokenizer, prompt, limit) for prompt in rows]
        columns = predict(rows, file_loglikelihoods(file, encoded, work.progress))
        result = write_choices(rows, columns, work.out)
        served = {"asked": "log-likelihoods", "runtime": _version("llama-cpp-py-sync")}
    else:
        longest = max(len(encode(tokenizer, prompt.contexts[0])) for prompt in rows)
        new = score.written.max_new_tokens if score.written else LONGEST_LABEL
        with llama_server(file, min(limit, longest + new + ROOM), torch.get_num_threads()) as url:
            server, chat = ChatServer(url), read_chat({"": prompts})
            if chat and not all(_writes_prompt(server, chat, prompt, tokenizer.bos_token) for prompt in rows):
                chat = None
            options = partial(_options, file.parent, score, bool(chat))
            replies = ask_rows(server, rows, chat, options, work.progress)
            template = sha256(str(server.properties()["chat_template"]).encode()).hexdigest()
        result = write_answers(rows, [text for text, _ in replies], score, work.out)
        served = {"asked": "chat" if chat else "prompt", "runtime": _version("xllamacpp"), "template": template}
    common = {"benchmark": score.benchmark, "metric": score.metric, "examples": len(rows)}
    facts = {"bytes": file.stat().st_size, "served": served}
    (work.out / "metrics.json").write_text(json.dumps(common | result | facts, indent=1) + "\n")
    return {"examples": len(rows), "asked": served["asked"]}


def _version(package: str) -> str:
    return f"llama.cpp of {package} {version(package)}"


def _options(folder: Path, score: ScoreSettings, is_chat: bool, prompt: Prompt) -> dict[str, Any]:
    """What goes with a prompt to llama.cpp's server; where a chat asks, it has the grammar of the labels already."""
    if written := score.written:
        schema = json.loads(file.read_text(encoding="utf-8")) if (file := folder / SCHEMA).is_file() else None
        return written_options(written.stop, written.max_new_tokens, schema)
    return {} if is_chat else {"grammar": grammar_of(_with_space(prompt))}


def any_server_options(folder: Path, score: ScoreSettings, prompt: Prompt) -> dict[str, Any]:
    """What goes with the prompt of a chat to any server: the choices as llama.cpp and as vLLM read them."""
    if score.written:
        return _options(folder, score, True, prompt)
    return {"grammar": grammar_of(_with_space(prompt)), "structured_outputs": {"choice": _with_space(prompt)}}


def ask_rows(
    server: ChatServer,
    rows: Sequence[Prompt],
    chat: Chat | None,
    options: Callable[[Prompt], dict[str, Any]],
    progress: Progress = silent,
) -> list[Reply]:
    """What a server writes after the prompt of every row, in a chat or, without one, for the prompt itself.

    A row that is longer than the server's context has an empty answer.
    """
    replies: list[Reply] = []
    for done, prompt in enumerate(rows, 1):
        try:
            if chat:
                reply = server.chat({"messages": messages_of(chat, prompt), **options(prompt)})
            else:
                reply = server.complete({"prompt": _asked(prompt), **options(prompt)})
        except Refused as error:
            if error.kind != TOO_LONG:
                raise
            reply = "", TOO_LONG
        replies.append(reply)
        progress(done, len(rows))
    return replies


def _writes_prompt(server: ChatServer, chat: Chat, prompt: Prompt, bos: str | None) -> bool:
    """Tell whether the chat template of llama.cpp's server writes the prompt of a row."""
    told = server.ask("/apply-template", {"messages": messages_of(chat, prompt)})
    return str(told["prompt"]).removeprefix(bos or "") == _asked(prompt).removeprefix(bos or "")


def messages_of(chat: Chat, prompt: Prompt) -> list[dict[str, str]]:
    """What a client sends to ask a prompt."""
    if prompt.messages:
        return list(json.loads(prompt.messages))
    return [{"role": "user", "content": chat.message_in(prompt.contexts[0])}]


def _asked(prompt: Prompt) -> str:
    """What is read before an answer: white space belongs to the answer, unless a base's chat template writes it."""
    return prompt.contexts[0] if prompt.end else prompt.contexts[0].rstrip()


def _have_common_answers(rows: Sequence[Prompt]) -> bool:
    return len({frozenset(prompt.continuations) for prompt in rows}) == 1


def _with_space(prompt: Prompt) -> list[str]:
    """The choices of a prompt, with the white space at its end, which is not asked."""
    return [prompt.contexts[0][len(_asked(prompt)) :] + answer for answer in prompt.continuations]


def write_answers(rows: Sequence[Prompt], texts: Sequence[str], score: ScoreSettings, out: Path) -> dict[str, float]:
    """Write what `score_benchmark` writes, of answers in words, and return its metrics; -1 is none of the choices."""
    if score.written:
        return write_texts(rows, texts, score, out)
    choices = [[answer.strip() for answer in prompt.continuations] for prompt in rows]
    picked = [own.index(text.strip()) if text.strip() in own else -1 for own, text in zip(choices, texts, strict=True)]
    columns: dict[str, list[Any]] = {
        "example": [prompt.example for prompt in rows],
        "loglikelihoods": [[] for _ in rows],
        "prediction": picked,
        "prediction_norm": picked,
        "answer": [prompt.answer for prompt in rows],
    }
    return write_choices(rows, columns, out)
