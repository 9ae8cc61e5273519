"""Prune a model at one ratio, tailor it to each benchmark, and score every adapter on all benchmarks: a heat map.

python -m flows.transfer data/transfer.toml [--set key=value …]
"""

from __future__ import annotations

import sys
from threading import Thread
from typing import Any

if __name__ == "__main__":  # before the imports below, so that both go on at once
    from flows._server import leaving, reach_server

    server = reach_server()

from prefect import flow, get_run_logger

from flows._main import check_deployed, run_flow, run_name
from flows._models import Dense, adapter_of, dense_of, healed_of, lessons_of, prompts_of, pruned_of
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tailored_llama.errors import one_line
from tailored_llama.preflight import preflight
from tailored_llama.transfer import DENSE, GENERIC, PRUNED, check_transfer, load_transfer, read_transfer
from tailored_llama.transfer_report import console_table
from tasks.score import score
from tasks.transfer import write_transfer


@flow(name="transfer", flow_run_name=run_name, persist_result=False)
def transfer(config: RunConfig) -> ArtifactRef:
    """Tailor to each benchmark, score on all; a row or cell that fails is in the table, and stops no other."""
    check_deployed(preflight, config)
    ratio = check_transfer(config)
    names = [benchmark.name for benchmark in config.benchmarks]
    prompts = prompts_of(config)
    dense = dense_of(config, prompts)
    pruned = healed_of(config, dense, ratio, pruned_of(config, dense, ratio), prompts)
    lessons = lessons_of(config, dense, prompts, names)
    models = [
        (DENSE, dense.checkpoint, None),
        (PRUNED, pruned, None),
        (GENERIC, pruned, _tried(_generic, config, names, ratio, pruned, dense)),
        *((name, pruned, _tried(adapter_of, config, [name], ratio, pruned, prompts, lessons)) for name in names),
    ]
    made = []
    for model, checkpoint, adapter in models:
        label = f"tuned on {model}" if adapter else model
        for name in names:
            found = adapter
            if not isinstance(adapter, str):  # the error that left no adapter
                found = _tried(score, config, name, label, checkpoint, prompts.evaluation[name], adapter)
            made.append({"model": model, "benchmark": name, "error" if isinstance(found, str) else "scores": found})
    return write_transfer(config, made).result()


def _generic(config: RunConfig, names: list[str], ratio: float, base: Any, dense: Dense) -> Any:
    """The adapter that is tuned on all benchmarks at once, by the generic template."""
    mixed = config.model_copy(update={"tuning": config.tuning.model_copy(update={"examples": "mixture"})})
    prompts = prompts_of(mixed)
    return adapter_of(mixed, names, ratio, base, prompts, lessons_of(mixed, dense, prompts, names))


def _tried(build: Any, config: RunConfig, benchmark: Any, *arguments: Any) -> Any:
    """What is built, or the message of the error that ended it."""
    try:
        return build(config, benchmark, *arguments)
    except Exception as error:
        get_run_logger().error("%s failed: %s", benchmark, error)
        return one_line(error)


def main(arguments: list[str] | None = None, server: Thread | None = None) -> int:
    """Run the flow from a configuration file; print the table and where the report is."""
    return run_flow(
        transfer,
        load_transfer,
        lambda folder: console_table(read_transfer(folder)),
        "transfer.html",
        arguments,
        server,
        example="data/transfer.toml",
    )


if __name__ == "__main__":
    with leaving():
        sys.exit(main(server=server))
