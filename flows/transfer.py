"""Prune a model at one ratio, tailor it to each benchmark, and score every adapter on all benchmarks: a heat map."""

from __future__ import annotations

from functools import partial

from prefect import flow

from flows._command import Command, check_deployed, run_name
from flows._outcome import Attempt, conclude
from flows._steps import Dense, heal_if_asked, prepare_dense, prune_to, render_all, teacher_outputs, tune_adapter
from tailored_llama.config import DENSE, GENERIC, UNTUNED_MODEL, RunConfig, check_transfer
from tailored_llama.errors import one_line
from tailored_llama.preflight import preflight
from tailored_llama.reports import transfer_table
from tailored_llama.store import ArtifactRef
from tasks._dispatch import THREADED
from tasks._results import TransferScore
from tasks.score import score
from tasks.transfer import write_transfer


@flow(name="transfer", flow_run_name=run_name, persist_result=False, task_runner=THREADED)
def transfer(config: RunConfig) -> ArtifactRef:
    """Tailor to each benchmark, score on all; a failed row or cell appears in the table and stops no other.

    Raises:
        IncompleteRun: at the end, if a cell failed.
    """
    check_deployed(preflight, config)
    ratio = check_transfer(config)
    names = [benchmark.name for benchmark in config.benchmarks]
    prompts = render_all(config)
    dense = prepare_dense(config, prompts)
    pruned = heal_if_asked(config, dense, ratio, prune_to(config, dense, ratio), prompts)
    teachers = teacher_outputs(config, dense, prompts, names)

    tuned = {GENERIC: Attempt(GENERIC, partial(_generic_adapter, config, names, ratio, pruned, dense))}
    for own in names:
        tuned[own] = Attempt(own, partial(tune_adapter, config, [own], ratio, pruned, prompts, teachers))

    def score_on(name: str, model: str) -> ArtifactRef:
        checkpoint, adapter = dense.checkpoint if model == DENSE else pruned, tuned.get(model)
        label = f"tuned on {model}" if adapter else model
        return score(config, name, label, checkpoint, prompts.evaluation[name], adapter.value if adapter else None)

    attempts = {
        (model, name): Attempt(f"{model} on {name}", partial(score_on, name, model))
        for model in (DENSE, UNTUNED_MODEL, *tuned)
        for name in names
    }
    scores, failed = [], {}
    for (model, name), attempt in attempts.items():
        outcome = attempt.wait()
        if isinstance(outcome, Exception):
            failed[attempt.name] = outcome
            scores.append(TransferScore(model, name, error=one_line(outcome)))
        else:
            scores.append(TransferScore(model, name, outcome))
    return conclude(write_transfer(config, scores), failed)


def _generic_adapter(config: RunConfig, names: list[str], ratio: float, base: ArtifactRef, dense: Dense) -> ArtifactRef:
    """Tune the adapter for all benchmarks at once, with the generic template."""
    mixed = config.model_copy(update={"tuning": config.tuning.model_copy(update={"examples": "mixture"})})
    prompts = render_all(mixed)
    return tune_adapter(mixed, names, ratio, base, prompts, teacher_outputs(mixed, dense, prompts, names))


COMMAND = Command(transfer, preflight, transfer_table, "transfer.html")

if __name__ == "__main__":
    raise SystemExit("error: got python -m flows.transfer; allowed: python -m flows transfer CONFIG.toml")
