"""Prune a model at one ratio, tailor it to each benchmark, and score every adapter on all benchmarks: a heat map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prefect import flow, get_run_logger

from flows._steps import (
    Command,
    Dense,
    check_deployed,
    heal_if_asked,
    prepare_dense,
    prune_to,
    render_all,
    run_name,
    teacher_outputs,
    tune_adapter,
)
from tailored_llama.config import DENSE, GENERIC, UNTUNED_MODEL, RunConfig, check_transfer, load_transfer
from tailored_llama.errors import one_line
from tailored_llama.preflight import preflight
from tailored_llama.reports import transfer_table
from tailored_llama.store import ArtifactRef
from tasks._results import TransferScore
from tasks.score import score
from tasks.transfer import write_transfer


@flow(name="transfer", flow_run_name=run_name, persist_result=False)
def transfer(config: RunConfig) -> ArtifactRef:
    """Tailor to each benchmark, score on all; a failed row or cell appears in the table and stops no other."""
    check_deployed(preflight, config)
    ratio = check_transfer(config)
    names = [benchmark.name for benchmark in config.benchmarks]
    prompts = render_all(config)
    dense = prepare_dense(config, prompts)
    pruned = heal_if_asked(config, dense, ratio, prune_to(config, dense, ratio), prompts)
    teachers = teacher_outputs(config, dense, prompts, names)

    models: list[tuple[str, ArtifactRef, ArtifactRef | str | None]] = [
        (DENSE, dense.checkpoint, None),
        (UNTUNED_MODEL, pruned, None),
        (GENERIC, pruned, _tried(GENERIC, partial(_generic_adapter, config, names, ratio, pruned, dense))),
        *((n, pruned, _tried(n, partial(tune_adapter, config, [n], ratio, pruned, prompts, teachers))) for n in names),
    ]
    scores = []
    for model, checkpoint, adapter in models:
        label = f"tuned on {model}" if adapter else model
        for name in names:
            if isinstance(adapter, str):  # the error that left no adapter
                scores.append(TransferScore(model, name, error=adapter))
                continue
            asked = prompts.evaluation[name]
            result = _tried(name, partial(score, config, name, label, checkpoint, asked, adapter))
            error = result if isinstance(result, str) else None
            scores.append(TransferScore(model, name, None if isinstance(result, str) else result, error))
    return write_transfer(config, scores)


def _generic_adapter(config: RunConfig, names: list[str], ratio: float, base: ArtifactRef, dense: Dense) -> ArtifactRef:
    """Tune the adapter for all benchmarks at once, with the generic template."""
    mixed = config.model_copy(update={"tuning": config.tuning.model_copy(update={"examples": "mixture"})})
    prompts = render_all(mixed)
    return tune_adapter(mixed, names, ratio, base, prompts, teacher_outputs(mixed, dense, prompts, names))


def _tried(name: str, build: Callable[[], ArtifactRef]) -> ArtifactRef | str:
    """The built artifact, or the message of the error that stopped it."""
    try:
        return build()
    except Exception as error:
        get_run_logger().error("%s failed: %s", name, error)
        return one_line(error)


COMMAND = Command(transfer, load_transfer, preflight, transfer_table, "transfer.html")

if __name__ == "__main__":
    raise SystemExit("error: got python -m flows.transfer; allowed: python -m flows transfer CONFIG.toml")
