"""Prune a model by every combination of a grid of settings, measure each, and draw the curves.

python -m flows.sweep data/sweep.toml [--set key=value …]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from threading import Thread
from typing import Any

if __name__ == "__main__":  # before the imports below, so that both go on at once
    from flows._server import leaving, reach_server

    server = reach_server()

from prefect import flow, get_run_logger

from flows._main import check_deployed, run_flow, run_name
from flows._models import Prompts, adapters_of, dense_of, healed_of, prompts_of, pruned_of, searched_prompts
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tailored_llama.errors import one_line
from tailored_llama.preflight import preflight
from tailored_llama.sweep_report import console_table
from tailored_llama.sweeps import Cell, SweepConfig, cells, dense_runs, load_sweep, read_sweep
from tailored_llama.texts import PROMPTS
from tasks.load_model import load_model
from tasks.perplexity import measure_perplexity
from tasks.score import score
from tasks.sweep import write_sweep


@flow(name="sweep", flow_run_name=run_name, persist_result=False)
def sweep(config: SweepConfig) -> ArtifactRef:
    """Measure every dense model and every cell; what fails is in the table, and does not stop the others."""
    check_deployed(_preflight, config)
    log = get_run_logger()
    every = cells(config)  # a bad one is found before any work
    made: list[dict[str, Any]] = []
    models = dense_runs(config, every)
    for label, run in models.items():
        named = {"label": label, "ratio": 0.0, "curve": None, "place": None, "seed": run.seed}
        try:
            model = _dense(config, run, load_model(run.store, run.model), _prompts(config, run))
            made.append(named | model | {"dense": model})
        except Exception as error:
            if len(models) == 1:  # then there is nothing to go on with
                raise
            log.error("%s failed: %s", label, error)
            made.append(named | {"error": one_line(error)})
    for cell in every:
        (ratio,) = cell.run.pruning.ratios
        named = {"label": cell.label, "ratio": ratio, "curve": cell.curve, "place": cell.place, "seed": cell.run.seed}
        try:
            made.append(named | _measured(config, cell, f"{cell.label} @ {ratio:g}", ratio))
        except Exception as error:
            log.error("cell %s @ %g, seed %d failed: %s", cell.label, ratio, cell.run.seed, error)
            made.append(named | {"error": one_line(error)})
    return write_sweep(config, made).result()


def _prompts(config: SweepConfig, run: RunConfig) -> Prompts:
    """The prompts of a cell, where anything reads them."""
    needed = config.scored or config.tailored or run.calibration.source == PROMPTS
    return prompts_of(run) if needed else Prompts({}, {}, {})


def _dense(config: SweepConfig, run: RunConfig, model: Any, prompts: Prompts) -> dict[str, Any]:
    """The dense model of a run, and what is measured of it."""
    scores = _scores(config, run, "dense", model, prompts)
    return {"checkpoint": model, "perplexity": measure_perplexity(run, "dense", model), "scores": scores}


def _measured(config: SweepConfig, cell: Cell, label: str, ratio: float) -> dict[str, Any]:
    """A cell pruned, healed and tuned as it says, and what is measured of it."""
    run = cell.run
    prompts = _prompts(config, run)
    dense = dense_of(run, prompts)
    healed = healed_of(run, dense, ratio, pruned_of(run, dense, ratio), prompts)
    perplexity = measure_perplexity(run, label, healed)
    asked = searched_prompts(run, healed) if cell.searched else prompts
    adapters = adapters_of(run, dense, ratio, healed, asked) if config.tailored else {}
    return {
        "checkpoint": healed,
        "perplexity": perplexity,
        "scores": _scores(config, run, label, healed, asked, adapters),
        "dense": _dense(config, run, dense.checkpoint, prompts),
        "templates": asked.templates,
    }


def _scores(
    config: SweepConfig,
    run: RunConfig,
    label: str,
    model: Any,
    prompts: Prompts,
    adapters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores of every benchmark, where the sweep has any."""
    names = [benchmark.name for benchmark in run.benchmarks] if config.scored or config.tailored else []
    return {
        name: score(run, name, label, model, prompts.evaluation[name], (adapters or {}).get(name)) for name in names
    }


def main(arguments: list[str] | None = None, server: Thread | None = None) -> int:
    """Run the flow from a configuration file; print the table and where the report is."""
    return run_flow(
        sweep,
        load_sweep,
        lambda folder: console_table(read_sweep(folder)),
        "sweep.html",
        arguments,
        server,
        example="data/sweep.toml",
        check=_preflight,
    )


def _preflight(config: SweepConfig) -> None:
    every = cells(config)
    for run in [*dense_runs(config, every).values(), *(cell.run for cell in every)]:
        preflight(run)


if __name__ == "__main__":
    with leaving():
        sys.exit(main(server=server))
