"""A proof repeated on a server that the user runs: any that speaks OpenAI's protocol, with any model."""

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tailored_llama import data, evaluation, serving
from tailored_llama.config import BenchmarkConfig, SmallestConfig, is_written, named_benchmark
from tailored_llama.console import progress_bar
from tailored_llama.data import Chat, Prompt
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Answers, LossTest, ScoreSettings
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.executor import FolderExecutor
from tailored_llama.pipeline.proven import Certificate, certified_rows
from tailored_llama.serving import ChatServer
from tailored_llama.store import sha256_file

REPEATED = 5  # rows that are asked twice: greedy answers do not change
# The share of answers that may change though everything is as certified. A server that has kept the beginning of a
# prompt, or another number of threads, rounds otherwise, which decides between answers that are as likely.
ROUNDING = 0.01
_ANY = Chat((), "", (), (), (), 0)  # with a model that somebody else made: no grammar or schema stands beside it


def verify_server(
    run: FolderExecutor, certificate: Certificate, server: ChatServer
) -> tuple[dict[str, LossTest], list[str]]:
    """Ask a server every proving row as it was asked for the certificate, and test again; also what differs.

    Choices that were ranked are asked in a chat. The reference's answers are the recorded ones.

    Raises:
        InputError: the rows are not those of the certificate; the server has another model or another chat template.
        UnreachableError: no server answers.
    """
    server = server.named()
    _check_model(certificate, server)
    config, tests, differences = certificate.config, dict[str, LossTest](), list[str]()
    for name, prompts in certified_rows(run, certificate):
        folder, served = run.open(prompts), certificate.content.served.get(name)
        chat = None if served and served.asked == "prompt" else data.read_chat(folder)
        chat = chat and serving.shipped_chat(chat, certificate.folder)
        rows, score = data.read_prompts(folder, "evaluation"), ScoreSettings.of(named_benchmark(config, name))
        ended, unsteady = _ask(server, rows, score, serving.requests_of(rows, score, chat), run.scratch)
        pair, (*_, small) = certificate.compare(name, run.scratch, folder), certificate.recorded(name)
        tests[name] = certificate.test(name, pair)
        unended, changed = served.unended if served else 0, int(np.sum(small != pair.small.values))
        ranked = ", as choices were ranked and are written now" * bool(served and served.asked == "log-likelihoods")
        told = {
            f"{ended} answers end at the limit of tokens, {unended} when certified: its stop or grammar is another": (
                abs(ended - unended) > ROUNDING * len(rows)
            ),
            f"{unsteady} of {REPEATED} answers change when asked again: its temperature is another": unsteady > 0,
            f"{changed} answers score otherwise than when certified{ranked}": changed > ROUNDING * len(rows),
        }
        differences += [f"{name}: {what}" for what, differs in told.items() if differs]
    return tests, differences


def compare_servers(
    run: FolderExecutor, config: SmallestConfig, dense: ChatServer, small: ChatServer
) -> dict[str, LossTest]:
    """Ask two servers all rows of each benchmark in a chat, and test what the second loses; no certificate is needed.

    Raises:
        InputError: no chat can ask the rows; or a server has several models, none named.
        UnreachableError: no server answers.
    """
    goal, tests = config.goal, dict[str, LossTest]()
    servers, level = (dense.named(), small.named()), evaluation.level_of(1, goal.confidence)
    for benchmark in config.benchmarks:
        rows, score = _rows(run, config, benchmark), ScoreSettings.of(benchmark)
        requests, scored = serving.requests_of(rows, score, _ANY), list[Answers]()
        for server in servers:
            _ask(server, rows, score, requests, run.scratch)
            scored.append(evaluation.read_answers(run.scratch, score.metric))
        before, after = scored
        tests[benchmark.name] = evaluation.noninferiority_test(before, after, goal.tested_margin, level)
    return tests


def _rows(run: FolderExecutor, config: SmallestConfig, benchmark: BenchmarkConfig) -> list[Prompt]:
    """The rows of a benchmark as messages: their own, or one with all that differs by row; servers have the template.

    A choice may be written with the white space before it that a layout has, as models are tuned to, or without.
    """
    name, examples = benchmark.name, steps.load_examples(benchmark)
    turns = data.join_splits(run.open(examples)) if benchmark.data else {}  # no row is tuned on here
    settings = data.PromptSettings.of(config, benchmark, "evaluation")  # no base's chat template asks them
    prompts = run.open(stages.prompts(f"render {name}", settings=settings, examples=examples))
    if (chat := data.read_chat(prompts)) is None:
        told = "got prompts that no chat asks; allowed: rows that differ in one part of the prompt"
        raise InputError(f"{name}: {told}")
    rows = [row for row in data.read_prompts(prompts, "evaluation") if row.answer != data.UNLABELLED]
    for i, row in enumerate(rows):
        context, choices = row.contexts[0], row.continuations
        messages = json.loads(turns.get(row.example, "[]")) or [{"role": "user", "content": chat.message_in(context)}]
        if benchmark.instruction and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": benchmark.instruction}, *messages]
        if not is_written(benchmark):
            choices = tuple(context[len(context.rstrip()) :] + choice for choice in choices)
            choices += tuple(map(str.strip, choices))
        rows[i] = replace(row, contexts=("",), continuations=choices, messages=json.dumps(messages))
    return rows


def _ask(
    server: ChatServer, rows: Sequence[Prompt], score: ScoreSettings, requests: Sequence[dict[str, Any]], out: Path
) -> tuple[int, int]:
    """Ask a server the rows of a benchmark, and write its scores into a folder.

    Returns how many answers the limit of tokens ended, and how many changed when they were asked again.
    """
    with progress_bar(f"ask {score.benchmark}") as progress:
        replies = serving.ask_all(server, requests, progress)
    again = serving.ask_all(replace(server, kept=None), requests[:REPEATED])
    serving.write_answers(rows, replies, score, out)
    changed = sum(first != second for first, second in zip(replies, again, strict=False))
    return serving.unended(replies), changed


def _check_model(certificate: Certificate, server: ChatServer) -> None:
    """Check that a server has the certified file and chat template, as far as it tells them."""
    content, told = certificate.content, server.properties()
    file, templates = Path(str(told.get("model_path") or "")), {own.template for own in content.served.values()}
    if certificate.is_served and file.name:
        name = certificate.weights[0].name
        is_same = sha256_file(file) == content.model.sha256[name] if file.is_file() else file.name == name
        if not is_same:
            raise InputError(f"{server.url}: has the model {file}; allowed: {name}, as it was certified")
    template = told.get("chat_template")
    if template and templates - {None} and sha256(str(template).encode()).hexdigest() not in templates:
        raise InputError(f"{server.url}: has another chat template; allowed: the one that the model was certified with")
