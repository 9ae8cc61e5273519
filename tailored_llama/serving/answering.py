"""A finished model that answers new rows, by llama.cpp's own server or by transformers; or that is served."""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import torch

from tailored_llama.console import progress_bar, quietly
from tailored_llama.data import Chat, Prompt, Question, read_chat, read_questions, score_prompts
from tailored_llama.errors import InputError
from tailored_llama.evaluation import WrittenAnswer, choice_probabilities, generate
from tailored_llama.files import read_file
from tailored_llama.models import load_model, load_tokenizer, token_budget
from tailored_llama.progress import Progress, silent
from tailored_llama.serving.chat import SCHEMA, curl_call, grammar_of, written_options
from tailored_llama.serving.client import ChatServer, ask_all
from tailored_llama.serving.server import CONTEXT, GRAMMAR, HOST, TEMPLATE, llama_server
from tailored_llama.store import CERTIFICATE, check_certified

ASKED = (TEMPLATE, "chat.json", GRAMMAR, SCHEMA)  # files that say what is asked, and what may be answered


@dataclass(frozen=True)
class ModelAnswer:
    """An answer, and the probability of its tokens; of a choice from transformers, its probability among the choices.

    llama.cpp's probabilities are those of the model before a grammar limits what it may write.
    """

    text: str
    probability: float

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Model(AbstractContextManager["Model"]):
    """A finished model that answers rows. It is closed at the end of a `with` block."""

    folder: Path
    chat: Chat = field(repr=False)
    ask: Callable[[Sequence[Question], Progress], list[ModelAnswer]] = field(repr=False)
    opened: ExitStack = field(default_factory=ExitStack, repr=False)

    def answer(self, row: Any) -> ModelAnswer:
        """The answer to one row: a text, which is the user's whole message, or a dict."""
        return self.ask(read_questions(self.chat, [{"message": row} if isinstance(row, str) else row]), silent)[0]

    def answers(self, rows: Any) -> Any:
        """A pandas.DataFrame of rows with the columns `answer` and `probability`.

        Rows are a list of texts or dicts, a data frame, a Dataset, or a file. They have the columns that the model was
        tuned on, without answers, or the column `message`, which is the user's whole message. A row that is longer than
        llama.cpp's context has an empty answer without a probability. InputError: a column is missing or taken, or has
        something else in it.
        """
        import pandas as pd

        if not isinstance(rows, pd.DataFrame):
            listed = read_file(Path(rows)) if isinstance(rows, str | Path) else rows
            rows = pd.DataFrame([{"message": row} if isinstance(row, str) else row for row in listed])
        if taken := {"answer", "probability"}.intersection(rows):
            raise InputError(f"rows: got the columns {', '.join(rows)}; allowed: none that is called {min(taken)}")
        questions = read_questions(self.chat, json.loads(rows.to_json(orient="records")))  # which makes arrays lists
        with progress_bar("answers") as progress:
            answers = self.ask(questions, progress)
        return rows.assign(answer=[one.text for one in answers], probability=[one.probability for one in answers])

    def close(self) -> None:
        """End llama.cpp's server."""
        self.opened.close()

    def __exit__(self, *error: object) -> None:
        self.close()


@quietly()
def load(folder: str | Path, context: int = CONTEXT) -> Model:
    """Load a finished model, which a run or `smallest` exported, to answer rows.

    A GGUF file is served by llama.cpp's own server, in a process that ends with this one, or when the model is closed.
    `context` is the number of tokens of a row and its answer there, at most.

    Raises:
        InputError: there is no model in the folder, or none that a chat can ask.
    """
    chat, file = find_finished(folder := Path(folder).expanduser())
    if not file:
        ask = partial(_ask_checkpoint, load_model(folder, device="auto"), load_tokenizer(folder), chat)
        return Model(folder, chat, ask)
    opened = ExitStack()
    url, _ = opened.enter_context(llama_server(file, context, torch.get_num_threads()))
    model = Model(folder, chat, partial(_ask_server, ChatServer(url), chat), opened)
    finalize(model, opened.close)  # before Python ends: it aborts if it ends while the server's output is read
    return model


def find_finished(folder: Path) -> tuple[Chat, Path | None]:
    """The chat of a finished model, and its GGUF file if it is none of transformers; InputError: one is missing."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1 or not (files or (folder / "config.json").is_file()):
        got = " and ".join(file.name for file in files) or "no model"
        raise InputError(f"{folder}: got {got}; allowed: a folder with one GGUF file, or a checkpoint")
    if (certificate := folder / CERTIFICATE).is_file():
        _check_certified(certificate)
    with suppress(OSError, ValueError, TypeError, AttributeError):
        if chat := read_chat(folder):
            return chat, next(iter(files), None)
    allowed = "a model that a run or smallest exported, whose rows a chat can ask"
    raise InputError(f"{folder / 'chat.json'}: missing or broken; allowed: {allowed}")


def _check_certified(file: Path) -> None:
    """Refuse a model that says otherwise than its certificate what is asked. Weights are not hashed."""
    try:
        listed = json.loads(file.read_bytes())["model"]["sha256"].items()
        hashes = {name: str(digest) for name, digest in listed if name in ASKED}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{file}: broken; allowed: the certificate of a proven model, as JSON") from None
    check_certified(file.parent, ASKED if hashes else (), hashes)  # the first format lists weights alone


def _ask_server(server: ChatServer, chat: Chat, questions: Sequence[Question], progress: Progress) -> list[ModelAnswer]:
    """What llama.cpp's server answers."""
    written = written_options(chat.stop, chat.new_tokens, chat.schema) if chat.new_tokens else None
    requests = [
        {"messages": messages, "logprobs": True, "top_logprobs": 1, **(written or {"grammar": grammar_of(choices)})}
        for messages, choices in questions
    ]
    replies = ask_all(server, requests, progress)
    return [ModelAnswer(text.strip(), math.nan if chance is None else chance) for text, _, chance in replies]


@quietly()
def _ask_checkpoint(
    model: Any, tokenizer: Any, chat: Chat, questions: Sequence[Question], progress: Progress
) -> list[ModelAnswer]:
    """What a model of transformers answers, asked by its chat template."""
    options = {"tokenize": False, "add_generation_prompt": True}
    contexts = [tokenizer.apply_chat_template(messages, **options) for messages, _ in questions]
    choices = [own for _, own in questions]
    if chat.new_tokens:
        texts = generate(model, tokenizer, contexts, WrittenAnswer(chat.new_tokens, chat.stop), progress=progress)
        choices, progress = [(text or tokenizer.eos_token,) for text in texts], silent  # the end, of an empty answer
    lengths = [tuple(len(text.strip()) for text in own) for own in choices]
    asked = enumerate(zip(contexts, choices, lengths, strict=True))
    prompts = [Prompt(i, (text,) * len(own), own, 0, sizes, chat.end) for i, (text, own, sizes) in asked]
    budget, writes = token_budget(None, model), bool(chat.answers)
    _, sums, written = score_prompts(model, tokenizer, prompts, writes, budget, progress)
    if chat.new_tokens:
        return [ModelAnswer(text.strip(), math.exp(total)) for text, (total,) in zip(texts, sums, strict=True)]
    shares = [choice_probabilities(*row, chat.metric) for row in zip(sums, lengths, strict=True)]
    rows = zip(choices, shares, written or [int(np.argmax(share)) for share in shares], strict=True)
    return [ModelAnswer(own[choice].strip(), float(share[choice])) for own, share, choice in rows]


def serve(folder: Path, port: int, context: int = CONTEXT) -> None:
    """Print how to ask a finished model, and serve it by llama.cpp or vLLM until Ctrl-C.

    InputError: as `load`; vLLM is missing, the port is taken, or llama.cpp cannot serve the file.
    """
    chat, file = find_finished(folder)
    if not file:
        if not (vllm := shutil.which("vllm")):
            raise InputError(f"{folder}: vLLM is not installed; allowed: a GGUF file, or after pip install vllm")
        print(curl_call(chat, file, f"http://{HOST}:{port}"), flush=True)
        os.execv(vllm, [vllm, "serve", str(folder), "--host", HOST, "--port", str(port)])
    with llama_server(file, context, torch.get_num_threads(), port) as (url, process), suppress(KeyboardInterrupt):
        print(curl_call(chat, file, url), flush=True)
        code = process.wait()
        raise InputError(f"{file}: llama.cpp's server ended with {code}; allowed: a server that runs until Ctrl-C")
