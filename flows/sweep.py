"""Prune a model by every combination of a grid of settings, measure each, and draw the curves.

python -m flows.sweep data/sweep.toml [--set key=value …]
"""

from __future__ import annotations

import argparse
import sys
from threading import Thread
from typing import Any

if __name__ == "__main__":  # before the imports below, so that both go on at once
    from flows._server import reach_server

    server = reach_server()

from prefect import flow, get_run_logger
from rich.console import Console

from flows._models import Prompts, dense_of, prompts_of, pruned_of
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tailored_llama.console import quiet_libraries
from tailored_llama.errors import InputError
from tailored_llama.preflight import preflight
from tailored_llama.sweeps import SweepConfig, cells, console_table, load_sweep, read_sweep
from tailored_llama.texts import PROMPTS
from tasks._stage import open_store
from tasks.load_model import load_model
from tasks.perplexity import measure_perplexity
from tasks.score import score
from tasks.sweep import write_sweep


@flow(name="sweep", flow_run_name="sweep {config.model.source}", persist_result=False)
def sweep(config: SweepConfig) -> ArtifactRef:
    """Measure the dense model and every cell; one that fails is in the table, and does not stop the others."""
    log = get_run_logger()
    every = cells(config)  # a bad one is found before any work
    prompts = _prompts(config, config)
    dense = load_model(config.store, config.model)
    made = [_measured(config, config, "dense", 0.0, dense, prompts)]
    for cell in every:
        (ratio,) = cell.run.pruning.ratios
        label = f"{cell.label} @ {ratio:g}"
        try:
            own = _prompts(config, cell.run)
            pruned = pruned_of(cell.run, dense_of(cell.run, own), ratio)
            made.append(_measured(config, cell.run, cell.label, ratio, pruned, own))
        except Exception as error:
            log.error("cell %s failed: %s", label, error)
            made.append({"label": cell.label, "ratio": ratio, "error": " ".join(str(error).split())[:300]})
    return write_sweep(config, made).result()


def _prompts(config: SweepConfig, run: RunConfig) -> Prompts:
    """The prompts of a cell, where anything reads them."""
    needed = config.scored or run.calibration.source == PROMPTS
    return prompts_of(run) if needed else Prompts({}, {})


def _measured(
    config: SweepConfig, run: RunConfig, label: str, ratio: float, model: Any, prompts: Prompts
) -> dict[str, Any]:
    shown = f"{label} @ {ratio:g}" if ratio else label
    names = [benchmark.name for benchmark in run.benchmarks] if config.scored else []
    return {
        "label": label,
        "ratio": ratio,
        "checkpoint": model,
        "perplexity": measure_perplexity(run, shown, model),
        "scores": {name: score(run, name, shown, model, prompts.evaluation[name]) for name in names},
    }


def main(arguments: list[str] | None = None, server: Thread | None = None) -> int:
    """Run the flow from a configuration file; print the table and where the report is."""
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description=sweep.__doc__)
    parser.add_argument("config", help="sweep configuration, a TOML file such as data/sweep.toml")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one field")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        config = load_sweep(options.config, options.set)
        for run in [config, *(cell.run for cell in cells(config))]:
            preflight(run)
        if server:
            server.join()
        ref = sweep(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = open_store(config.store).open(ref)
    Console().print(console_table(read_sweep(folder)))
    print(f"report: {folder / 'sweep.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(server=server))
