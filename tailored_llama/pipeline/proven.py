"""What becomes of a proven model: it is published, if it is better than the last one, and its proof is repeated."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailored_llama import data, evaluation
from tailored_llama.config import SmallestConfig, validate_as
from tailored_llama.errors import InputError, is_transient
from tailored_llama.evaluation import Answers, LossTest
from tailored_llama.pipeline import steps
from tailored_llama.pipeline.futures import Artifact
from tailored_llama.pipeline.reporting import CERTIFICATE, PROOF, PROOF_SCHEMA, answers_of
from tailored_llama.pipeline.runner import Runner
from tailored_llama.store import publish, published_file, read_table, sha256_file

log = logging.getLogger(__name__)

RETRY_AFTER = (10, 60, 300)  # seconds; what a server refuses now it may take in a minute


def publish_answer(target: str, model: Path | None) -> None:
    """Publish the proven model of a search, if there is one, and it is smaller than the one there, or loses less.

    Raises:
        InputError: as `published_file` and `publish`, after further tries; or the model there is for another goal.
    """
    if model is None:
        return log.info("nothing is published, as nothing is proven; what is at %s stays", target)
    for pause in (*RETRY_AFTER, None):
        try:
            return _publish(target, model)
        except Exception as error:
            if pause is None or not is_transient(error):
                raise
            log.warning("publishing is tried again in %d seconds: %s", pause, error)
            time.sleep(pause)


def _publish(target: str, model: Path) -> None:
    new, there = json.loads((model / CERTIFICATE).read_bytes()), published_file(target, CERTIFICATE)
    if there is not None:
        try:
            last = json.loads(there)
            other, best = _goal_of(last), _rank(last)
        except (ValueError, KeyError, TypeError, AttributeError):
            told = f"store.publish: the {CERTIFICATE} at {target} is not one; allowed: a new place"
            raise InputError(told) from None
        if (goal := _goal_of(new)) != other:
            raise InputError(
                f"store.publish: {target} has a model for another goal ({other}, here {goal}); allowed: a place for "
                "each goal"
            )
        if _rank(new) >= best:
            log.info("not published: %s, and that at %s, %s, stays", _figures(new), target, _figures(last))
            return
    publish(model, target, new["claim"])
    log.info("published to %s: %s", target, _figures(new))


def _goal_of(certificate: dict[str, Any]) -> str:
    margin, measure, confidence = (certificate[name] for name in ("margin_points", "measure", "confidence"))
    return f"{margin:g} points of {measure} at {100 * confidence:g} % on {', '.join(sorted(certificate['benchmarks']))}"


def _rank(certificate: dict[str, Any]) -> tuple[int, float]:
    """Bytes, then the loss on the worst benchmark: the lower the better."""
    return certificate["model"]["bytes"], max(test["loss"] for test in certificate["benchmarks"].values())


def _figures(certificate: dict[str, Any]) -> str:
    size, loss = _rank(certificate)
    return f"{size:,} bytes, {100 * loss:.2f} points lost"


@dataclass(frozen=True)
class Certificate:
    """A model's certificate, with the folder that it stands in and the run that it is of."""

    folder: Path
    content: dict[str, Any]
    config: SmallestConfig


def read_certificate(folder: Path, files: list[str] | None) -> Certificate:
    """Read a model's certificate, and check that it belongs to the files beside it.

    `files` are the user's own rows, in the order of their benchmarks; None: they are where they were.

    Raises:
        InputError: there is no certificate, it is broken, or a file of weights is missing or another.
    """
    path = folder / CERTIFICATE
    try:
        content = json.loads(path.read_text())
        run, hashes = dict(content["run"]), dict(content["model"]["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{path}: missing or broken; allowed: the folder of a model with its certificate") from None
    own = [benchmark for benchmark in run["benchmarks"] if benchmark.get("data")]
    if files and len(files) != len(own):
        raise InputError(f"rows: got {len(files)} files; allowed: {len(own)}, one for each benchmark of own rows")
    for benchmark, file in zip(own, files or (), strict=False):
        benchmark["data"] = file
    for name, expected in hashes.items():
        weights = folder / name
        if not weights.is_file() or sha256_file(weights) != expected:
            raise InputError(f"{weights}: missing or changed since it was certified; allowed: SHA-256 {expected[:12]}…")
    return Certificate(folder, content, validate_as(SmallestConfig, run))


def verify_certificate(run: Runner, certificate: Certificate, dense: str | None = None) -> dict[str, LossTest]:
    """Score a certified model again on its proving rows, and test it again; returns the tests by benchmark.

    `dense` is the reference, to be scored again as well; None: its recorded answers are taken.

    Raises:
        InputError: the rows are not those of the certificate.
    """
    config, content = certificate.config, certificate.content
    file = next(iter(content["model"]["sha256"])) if config.goal.runtime == "llama.cpp" else ""
    small = _load(run, config, str(certificate.folder / file))
    reference = _load(run, config, dense) if dense else None
    recorded, tests = read_table(certificate.folder / PROOF, PROOF_SCHEMA), {}
    for benchmark in config.benchmarks:
        name = benchmark.name
        prompts = steps.render(run, config, name, "evaluation", steps.load_examples(run, benchmark))
        digest = data.rows_digest(data.read_prompts(run.open(prompts), "evaluation"))
        if digest != (expected := content["sets"][name]["proving"]["sha256"]):
            raise InputError(
                f"{name}: its proving rows have SHA-256 {digest[:12]}…; allowed: {expected[:12]}…, the rows that the "
                "certificate is of"
            )
        after = _answers(run, config, name, small, prompts)
        if reference:
            before = _answers(run, config, name, reference, prompts)
        else:
            own = recorded["benchmark"].to_numpy() == name
            before = Answers(recorded["example"].to_numpy()[own], after.answers, recorded["dense"].to_numpy()[own])
        tests[name] = evaluation.noninferiority_test(before, after, config.goal.lose_at_most / 100, content["level"])
    return tests


def _load(run: Runner, config: SmallestConfig, source: str) -> Artifact:
    model = config.model.model_copy(update={"source": source, "revision": None})
    return steps.load_dense(run, config.model_copy(update={"model": model}))


def _answers(run: Runner, config: SmallestConfig, name: str, checkpoint: Artifact, prompts: Artifact) -> Answers:
    scores = steps.score(run, config, name, "again", checkpoint, prompts)
    return answers_of(config, name, run.open(scores), run.open(prompts))
