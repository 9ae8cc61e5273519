"""A proof repeated on a server that the user runs: any that speaks OpenAI's protocol, with any model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tailored_llama import data, evaluation, serving
from tailored_llama.config import SmallestConfig, asks_turns, named_benchmark
from tailored_llama.console import progress_bar
from tailored_llama.data import Chat
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Answers, LossTest, ScoreSettings
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.answers import answers_of
from tailored_llama.pipeline.executor import FolderExecutor
from tailored_llama.pipeline.proven import Certificate, certified_rows
from tailored_llama.serving import ChatServer
from tailored_llama.store import sha256_file

REPEATED = 5  # rows that are asked twice: greedy answers do not change


@dataclass(frozen=True)
class ServedAnswers:
    """How many answers of a server the limit of tokens ended, and how many changed when they were asked again."""

    unended: int
    unsteady: int


def verify_server(
    run: FolderExecutor, certificate: Certificate, server: ChatServer
) -> tuple[dict[str, LossTest], list[str]]:
    """Ask a server every proving row as it was asked for the certificate, and test again; also what differs.

    Choices that were ranked are asked in a chat. The reference's answers are the recorded ones.

    Raises:
        InputError: the certificate is of probabilities; the rows are not those of the certificate; the server has
            another model or another chat template.
        UnreachableError: no server answers.
    """
    if certificate.content.measure == "probability":
        raise InputError("--url: got a certificate of probabilities, which servers do not tell; allowed: of accuracy")
    server = server.named()
    _check_model(certificate, server)
    config, tests, differences = certificate.config, dict[str, LossTest](), list[str]()
    for name, prompts in certified_rows(run, certificate):
        folder, served = run.open(prompts), certificate.content.served.get(name)
        chat = None if served and served.asked == "prompt" else data.read_chat({name: folder})
        chat = chat and serving.shipped_chat(chat, certificate.folder)
        asked = _ask(run, config, name, folder, server, _requests(config, name, folder, chat))
        pair, (*_, small) = certificate.compare(name, run.scratch, folder), certificate.recorded(name)
        tests[name] = certificate.test(name, pair)
        unended, changed = served.unended if served else 0, int(np.sum(small != pair.small.values))
        ranked = ", as choices were ranked and are written now" * bool(served and served.asked == "log-likelihoods")
        told = {
            f"{asked.unended} answers end at the limit of tokens, {unended} when certified: its stop or grammar is "
            "another": asked.unended != unended,
            f"{asked.unsteady} of {REPEATED} answers change when asked again: its temperature is another": (
                asked.unsteady > 0
            ),
            f"{changed} answers score otherwise than when certified{ranked}": changed > 0,
        }
        differences += [f"{name}: {what}" for what, differs in told.items() if differs]
    return tests, differences


def compare_servers(
    run: FolderExecutor, config: SmallestConfig, dense: ChatServer, small: ChatServer
) -> dict[str, LossTest]:
    """Ask two servers all rows of each benchmark in a chat, and test what the second loses; no certificate is needed.

    Raises:
        InputError: no chat can ask the rows; or a server has several models, and none is named.
        UnreachableError: no server answers.
    """
    servers, tests, level = (dense.named(), small.named()), {}, evaluation.level_of(1, config.goal.confidence)
    for benchmark in config.benchmarks:
        name, examples = benchmark.name, steps.load_examples(benchmark)
        if benchmark.data:  # no row is tuned on here
            data.join_splits(run.open(examples))
        settings = data.PromptSettings.of(config, benchmark, "evaluation")  # no base's chat template asks them
        prompts = run.open(stages.prompts(f"render {name}", settings=settings, examples=examples))
        if (chat := data.read_chat({name: prompts})) is None:
            told = "got prompts that no chat asks; allowed: rows that differ in one part of the prompt"
            raise InputError(f"{name}: {told}")
        chat = replace(chat, answers=())  # no grammar of these stands beside a model that somebody else made
        requests = _requests(config, name, prompts, chat)
        if asks_turns(benchmark) and (system := benchmark.instruction):  # that all rows share
            for request in requests:
                request["messages"].insert(0, {"role": "system", "content": system})
        scored = list[Answers]()
        for server in servers:
            _ask(run, config, name, prompts, server, requests)
            scored.append(answers_of(config, name, run.scratch, prompts))
        before, after = scored
        tests[name] = evaluation.noninferiority_test(before, after, config.goal.lose_at_most / 100, level)
    return tests


def _requests(config: SmallestConfig, name: str, prompts: Path, chat: Chat | None) -> list[dict[str, Any]]:
    score = ScoreSettings.of(named_benchmark(config, name))
    return serving.requests_of(data.read_prompts(prompts, "evaluation"), score, chat)


def _ask(
    run: FolderExecutor,
    config: SmallestConfig,
    name: str,
    prompts: Path,
    server: ChatServer,
    requests: Sequence[dict[str, Any]],
) -> ServedAnswers:
    """Ask a server the rows of a benchmark, and write its scores into the executor's folder."""
    score, rows = ScoreSettings.of(named_benchmark(config, name)), data.read_prompts(prompts, "evaluation")
    with progress_bar(f"ask {name}") as progress:
        replies = serving.ask_all(server, requests, progress)
    again = serving.ask_all(server, requests[:REPEATED])
    serving.write_answers(rows, replies, score, run.scratch)
    changed = sum(first != second for first, second in zip(replies, again, strict=False))
    return ServedAnswers(serving.unended(replies), changed)


def _check_model(certificate: Certificate, server: ChatServer) -> None:
    """Check that a server has the certified file and chat template, as far as it tells them."""
    content, told = certificate.content, server.properties()
    file, templates = Path(str(told.get("model_path") or "")), {own.template for own in content.served.values()}
    if certificate.config.goal.runtime == "llama.cpp" and file.name:
        name = certificate.weights[0].name
        is_same = sha256_file(file) == content.model.sha256[name] if file.is_file() else file.name == name
        if not is_same:
            raise InputError(f"{server.url}: has the model {file}; allowed: {name}, as it was certified")
    template = told.get("chat_template")
    if template and templates - {None} and sha256(str(template).encode()).hexdigest() not in templates:
        raise InputError(f"{server.url}: has another chat template; allowed: the one that the model was certified with")
