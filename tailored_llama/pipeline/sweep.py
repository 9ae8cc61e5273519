"""Prune a model by every combination of a grid of settings, measure each, and draw the curves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tailored_llama.config import (
    RunConfig,
    SweepCell,
    SweepConfig,
    as_shown,
    dense_runs,
    reads_prompts,
    sweep_cells,
    trims_vocabulary,
    tuned_dense_cells,
)
from tailored_llama.evaluation import MeasuredModel, SweptCell
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.futures import Artifact, attempt, conclude, settle
from tailored_llama.pipeline.reporting import SweepSettings
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pipeline.steps import Prompts
from tailored_llama.store import ArtifactRef

Row = SweptCell[Artifact]


def sweep(run: Runner, config: SweepConfig) -> ArtifactRef:
    """Measure every dense model and every cell; a failure appears in the table and does not stop the others.

    With `tuning.dense`, dense models are also tuned on the shots of the cells.

    Raises:
        IncompleteRun: at the end, if a cell failed.
    """
    cells = sweep_cells(config)  # finds an invalid cell before any work
    models, tuned = dense_runs(config, cells), tuned_dense_cells(config, cells)
    attempts: list[tuple[str, Row, Row | Exception]] = []
    for label, own in models.items():
        row: Row = SweptCell(label, 0.0, own.seed)
        made = attempt(label, partial(_dense_row, run, config, own, row))
        if isinstance(made, Exception) and len(models) == 1:  # then no cell can be measured
            raise made
        attempts.append((label, row, made))
    for cell in tuned:
        row = SweptCell(cell.label, 0.0, cell.run.seed, cell.curve, cell.place)
        name = f"{row.name}, seed {row.seed}"
        attempts.append((name, row, attempt(name, partial(_tuned_row, run, config, cell.run, row))))
    measured: dict[int, tuple[str, Row, Row | Exception]] = {}
    for i, cell in sorted(enumerate(cells), key=lambda numbered: numbered[1].searched):  # a search waits for scores
        row = SweptCell(cell.label, cell.run.pruning.ratios[0], cell.run.seed, cell.curve, cell.place)
        name = f"cell {row.name} @ {row.ratio:g}, seed {row.seed}"
        measured[i] = name, row, attempt(name, partial(_measured, run, config, cell, row))
    attempts += [measured[i] for i in range(len(cells))]
    rows, failed = settle(attempts)
    return conclude(run(stages.SWEEP, SweepSettings(as_shown(config)), "sweep report", cells=rows), failed)


def _prompts(run: Runner, config: SweepConfig, own: RunConfig) -> Prompts:
    """The prompts of a cell, if anything reads them."""
    needed = config.scored or config.tailored or reads_prompts(own) or trims_vocabulary(own)
    return steps.render_all(run, own) if needed else Prompts()


def _dense(
    run: Runner, config: SweepConfig, own: RunConfig, model: Artifact, prompts: Prompts
) -> MeasuredModel[Artifact]:
    """Measure the dense model of a cell."""
    return steps.measure(run, own, "dense", model, _scored(config, prompts))


def _dense_row(run: Runner, config: SweepConfig, own: RunConfig, row: Row) -> Row:
    """Load and measure a dense model."""
    model = _dense(run, config, own, steps.load_dense(run, own), _prompts(run, config, own))
    return replace(row, model=model, dense=model)


def _tuned_row(run: Runner, config: SweepConfig, own: RunConfig, row: Row) -> Row:
    """Tune a dense model on the shots of a cell, and measure it."""
    prompts = _prompts(run, config, own)
    dense = _dense(run, config, own, steps.load_dense(run, own), prompts)
    scores = steps.tune_dense(run, own, dense.checkpoint, prompts).scores
    return replace(row, model=replace(dense, scores=scores), dense=dense)


def _measured(run: Runner, config: SweepConfig, cell: SweepCell, row: Row) -> Row:
    """Prune, heal and tune the model of a cell as configured, and measure it."""
    own, ratio, label = cell.run, row.ratio, f"{row.name} @ {row.ratio:g}"
    prompts = _prompts(run, config, own)
    dense = steps.prepare_dense(run, own, prompts)
    pruned = steps.prune_to(run, own, dense, ratio, prompts)
    healed = steps.heal_if_asked(run, own, dense.checkpoint, ratio, pruned, prompts)
    perplexity = steps.measure_perplexity(run, own, label, healed, dense.checkpoint)
    asked = steps.search_templates(run, own, healed) if cell.searched else prompts
    adapters = steps.tune_adapters(run, own, ratio, healed, asked) if config.tailored else {}
    scores = {
        name: steps.score(run, own, name, label, healed, rendered, adapters.get(name))
        for name, rendered in _scored(config, asked).evaluation.items()
    }
    model = MeasuredModel(healed, perplexity, scores, asked.templates)
    return replace(row, model=model, dense=_dense(run, config, own, dense.checkpoint, prompts))


def _scored(config: SweepConfig, prompts: Prompts) -> Prompts:
    """The prompts, with those to score only if the sweep scores any."""
    return prompts if config.scored or config.tailored else replace(prompts, evaluation={})
