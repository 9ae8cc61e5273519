"""Prune a model by every combination of a grid of settings, measure each, and draw the curves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from prefect import flow

from flows._command import Command, check_deployed, run_name
from flows._outcome import Attempt, conclude
from flows._steps import (
    Prompts,
    heal_if_asked,
    measure,
    prepare_dense,
    prune_to,
    render_all,
    search_templates,
    text_of,
    tune_adapters,
    tune_dense,
)
from tailored_llama.config import (
    RunConfig,
    SweepCell,
    SweepConfig,
    dense_runs,
    reads_prompts,
    sweep_cells,
    tuned_dense_cells,
)
from tailored_llama.errors import one_line
from tailored_llama.preflight import preflight_sweep
from tailored_llama.reports import sweep_table
from tailored_llama.store import ArtifactRef
from tasks._dispatch import THREADED
from tasks._results import MeasuredModel, SweptCell
from tasks.load_model import load_model
from tasks.perplexity import measure_perplexity
from tasks.score import score
from tasks.sweep import write_sweep


@flow(name="sweep", flow_run_name=run_name, persist_result=False, task_runner=THREADED)
def sweep(config: SweepConfig) -> ArtifactRef:
    """Measure every dense model and every cell; a failure appears in the table and does not stop the others.

    With `tuning.dense`, dense models are also tuned on the shots of the cells.

    Raises:
        IncompleteRun: at the end, if a cell failed.
    """
    check_deployed(preflight_sweep, config)
    cells = sweep_cells(config)  # finds an invalid cell before any work
    models, tuned = dense_runs(config, cells), tuned_dense_cells(config, cells)
    attempts: list[tuple[SweptCell, Attempt[SweptCell]]] = []
    for label, run in models.items():
        row = SweptCell(label, 0.0, run.seed)
        attempts.append((row, Attempt(label, partial(_dense_row, config, run, row))))
        if (error := attempts[-1][1].error) and len(models) == 1:  # then no cell can be measured
            raise error
    for cell in tuned:
        row = SweptCell(cell.label, 0.0, cell.run.seed, cell.curve, cell.place)
        attempts.append((row, Attempt(f"{row.label}, seed {row.seed}", partial(_tuned_row, config, cell.run, row))))
    for cell in cells:
        row = SweptCell(cell.label, cell.run.pruning.ratios[0], cell.run.seed, cell.curve, cell.place)
        name = f"cell {row.label} @ {row.ratio:g}, seed {row.seed}"
        attempts.append((row, Attempt(name, partial(_measured, config, cell, row))))
    results, failed = [], {}
    for row, attempt in attempts:
        outcome = attempt.wait()
        results.append(replace(row, error=one_line(outcome)) if isinstance(outcome, Exception) else outcome)
        if isinstance(outcome, Exception):
            failed[attempt.name] = outcome
    return conclude(write_sweep(config, results), failed)


def _prompts(config: SweepConfig, run: RunConfig) -> Prompts:
    """The prompts of a cell, if anything reads them."""
    needed = config.scored or config.tailored or reads_prompts(run)
    return render_all(run) if needed else Prompts()


def _dense(config: SweepConfig, run: RunConfig, model: ArtifactRef, prompts: Prompts) -> MeasuredModel:
    """Measure the dense model of a run."""
    return measure(run, "dense", model, prompts, _scored_names(config, run))


def _dense_row(config: SweepConfig, run: RunConfig, row: SweptCell) -> SweptCell:
    """Load and measure a dense model."""
    model = _dense(config, run, load_model(run.store, run.model), _prompts(config, run))
    return replace(row, model=model, dense=model)


def _tuned_row(config: SweepConfig, run: RunConfig, row: SweptCell) -> SweptCell:
    """Tune a dense model on the shots of a cell, and measure it."""
    prompts = _prompts(config, run)
    dense = _dense(config, run, load_model(run.store, run.model), prompts)
    return replace(row, model=replace(dense, scores=tune_dense(run, dense.checkpoint, prompts).scores), dense=dense)


def _measured(config: SweepConfig, cell: SweepCell, row: SweptCell) -> SweptCell:
    """Prune, heal and tune the model of a cell as configured, and measure it."""
    run, ratio, label = cell.run, row.ratio, f"{row.label} @ {row.ratio:g}"
    prompts = _prompts(config, run)
    dense = prepare_dense(run, prompts)
    healed = heal_if_asked(run, dense, ratio, prune_to(run, dense, ratio), prompts)
    perplexity = measure_perplexity(run, label, healed, text_of(run, dense.checkpoint))
    scored_prompts = search_templates(run, healed) if cell.searched else prompts
    adapters = tune_adapters(run, dense, ratio, healed, scored_prompts) if config.tailored else {}
    scores = {
        name: score(run, name, label, healed, scored_prompts.evaluation[name], adapters.get(name))
        for name in _scored_names(config, run)
    }
    return replace(
        row,
        model=MeasuredModel(healed, perplexity, scores),
        dense=_dense(config, run, dense.checkpoint, prompts),
        templates=scored_prompts.templates,
    )


def _scored_names(config: SweepConfig, run: RunConfig) -> list[str]:
    """The benchmarks to score, if the sweep scores any."""
    return [benchmark.name for benchmark in run.benchmarks] if config.scored or config.tailored else []


COMMAND = Command(sweep, preflight_sweep, sweep_table, "sweep.html")

if __name__ == "__main__":
    raise SystemExit("error: got python -m flows.sweep; allowed: python -m flows sweep CONFIG.toml")
