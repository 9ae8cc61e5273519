"""A proof repeated on a server that the user runs: any that speaks OpenAI's protocol, with any model."""

from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from tailored_llama import data, evaluation
from tailored_llama.config import SmallestConfig, named_benchmark
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Answers, LossTest, ScoreSettings
from tailored_llama.pipeline import steps
from tailored_llama.pipeline.proven import Certificate, certified_rows
from tailored_llama.pipeline.reporting import answers_of
from tailored_llama.pipeline.runner import FolderRunner
from tailored_llama.serving import ChatServer, any_server_options, ask_rows, write_answers
from tailored_llama.store import sha256_file

REPEATED = 5  # rows that are asked twice: greedy answers do not change


@dataclass(frozen=True)
class ServedAnswers:
    """What a server answers to the rows of a benchmark, and how many answers it would not end itself or repeat."""

    answers: Answers
    unended: int
    unsteady: int


def verify_server(
    run: FolderRunner, certificate: Certificate, server: ChatServer
) -> tuple[dict[str, LossTest], list[str]]:
    """Ask a server every proving row in a chat, and test again; also returns what is not as certified.

    The reference's answers are the recorded ones.

    Raises:
        InputError: the rows are not those of the certificate; the server has another model or another chat template.
        UnreachableError: no server answers.
    """
    _check_model(certificate, server)
    config, tests, differences = certificate.config, dict[str, LossTest](), list[str]()
    for name, prompts in certified_rows(run, certificate):
        folder = run.open(prompts)
        told = ask_benchmark(config, name, folder, server, certificate.folder, run.scratch)
        before, small = certificate.compared_with(name, told.answers)
        tests[name] = evaluation.noninferiority_test(
            before, told.answers, config.goal.lose_at_most / 100, certificate.content.level
        )
        counts = {
            "that do not end by themselves, so its stop differs": told.unended,
            "that change when asked again, so its temperature differs": told.unsteady,
            "that are right and were not, or the other way": int(np.sum(small != told.answers.values)),
        }
        differences += [f"{name}: {count} answers {what}" for what, count in counts.items() if count]
    return tests, differences


def compare_servers(
    run: FolderRunner, config: SmallestConfig, dense: ChatServer, small: ChatServer
) -> dict[str, LossTest]:
    """Ask two servers all rows of each benchmark in a chat, and test what the second loses; no certificate is needed.

    Raises:
        InputError: no chat can ask the rows.
        UnreachableError: no server answers.
    """
    tests, level = {}, evaluation.level_of(1, config.goal.confidence)
    for benchmark in config.benchmarks:
        name, nothing = benchmark.name, run.scratch
        prompts = run.open(steps.render(run, config, name, "evaluation", steps.load_examples(run, benchmark)))
        before, after = (ask_benchmark(config, name, prompts, own, nothing, nothing).answers for own in (dense, small))
        tests[name] = evaluation.noninferiority_test(before, after, config.goal.lose_at_most / 100, level)
    return tests


def ask_benchmark(
    config: SmallestConfig, name: str, prompts: Path, server: ChatServer, folder: Path, out: Path
) -> ServedAnswers:
    """Ask a server the rows of a benchmark in a chat, with the schema of a folder, if it has one."""
    score = ScoreSettings.of(named_benchmark(config, name))
    rows, chat = data.read_prompts(prompts, "evaluation"), data.read_chat({name: prompts})
    if chat is None:
        raise InputError(f"{name}: got prompts that no chat asks; allowed: rows that differ in one part of the prompt")
    options = partial(any_server_options, folder, score)
    replies = ask_rows(server, rows, chat, options)
    again = ask_rows(server, rows[:REPEATED], chat, options)
    write_answers(rows, [text for text, _ in replies], score, out)
    return ServedAnswers(
        answers_of(config, name, out, prompts),
        sum(reason == "length" for _, reason in replies) if score.written else 0,
        sum(first != second for first, second in zip(replies, again, strict=False)),
    )


def _check_model(certificate: Certificate, server: ChatServer) -> None:
    """Check that a server has the certified file and chat template, as far as it tells them."""
    names = [str(model.get("id")) for model in server.ask("models").get("data") or []]
    if server.model and names and server.model not in names:
        raise InputError(f"--model: got {server.model}; allowed: {', '.join(names)}, which {server.url} has")
    if not server.model and len(names) > 1:
        raise InputError(f"--model is missing; allowed: {', '.join(names)}, which {server.url} has")
    content, props = certificate.content, server.properties()
    file = Path(str(props.get("model_path") or ""))
    if certificate.config.goal.runtime == "llama.cpp" and file.name:
        certified = certificate.weights[0]
        if file.name != certified.name or (
            file.is_file() and sha256_file(file) != content.model.sha256[certified.name]
        ):
            raise InputError(f"{server.url}: has the model {file.name}; allowed: {certified.name}, as it was certified")
    templates = {serving.template for serving in content.served.values() if serving.template}
    if (template := props.get("chat_template")) and sha256(str(template).encode()).hexdigest() not in templates:
        raise InputError(
            f"{server.url}: has another chat template; allowed: the one that {file.name} was certified with"
        )
