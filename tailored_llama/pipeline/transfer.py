"""Prune a model at one ratio, tailor it to each benchmark, and score every adapter on all benchmarks: a heat map."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tailored_llama.config import DENSE, GENERIC, UNREAD_BY_TRANSFER, UNTUNED_MODEL, RunConfig, TransferConfig, as_shown
from tailored_llama.evaluation import TransferScore
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.futures import Artifact, attempt, conclude, settle
from tailored_llama.pipeline.reporting import ReportSettings
from tailored_llama.pipeline.runner import Runner
from tailored_llama.store import ArtifactRef


def transfer(run: Runner, config: TransferConfig) -> ArtifactRef:
    """Tailor to each benchmark, score on all; a failed row or cell appears in the table and stops no other.

    Raises:
        IncompleteRun: at the end, if a cell failed.
    """
    (ratio,) = config.pruning.ratios
    names = [benchmark.name for benchmark in config.benchmarks]
    prompts = steps.render_all(run, config)
    dense = steps.prepare_dense(run, config, prompts)
    pruned = steps.prune_to(run, config, dense, ratio, prompts)
    pruned = steps.heal_if_asked(run, config, dense.checkpoint, ratio, pruned, prompts)

    tuned = {GENERIC: attempt(GENERIC, partial(_generic_adapter, run, config, ratio, pruned))}
    for own in names:
        tuned[own] = attempt(own, partial(steps.tune, run, config, [own], ratio, pruned, prompts))

    def scored(row: TransferScore[Artifact]) -> TransferScore[Artifact]:
        checkpoint, adapter = dense.checkpoint if row.model == DENSE else pruned, tuned.get(row.model)
        label, asked = f"tuned on {row.model}" if adapter else row.model, prompts.evaluation[row.benchmark]
        if isinstance(adapter, Exception):
            raise adapter
        return replace(row, scores=steps.score(run, config, row.benchmark, label, checkpoint, asked, adapter))

    cells = [TransferScore[Artifact](model, name) for model in (DENSE, UNTUNED_MODEL, *tuned) for name in names]
    attempts = [(cell.label, cell, attempt(cell.label, partial(scored, cell))) for cell in cells]
    scores, failed = settle(attempts)
    settings = ReportSettings(as_shown(config, UNREAD_BY_TRANSFER))
    return conclude(run(stages.TRANSFER, settings, "transfer report", scores=scores), failed)


def _generic_adapter(run: Runner, config: RunConfig, ratio: float, base: Artifact) -> Artifact:
    """Tune the adapter for all benchmarks at once, with the generic template."""
    mixed = config.model_copy(update={"tuning": config.tuning.model_copy(update={"examples": "mixture"})})
    names = [benchmark.name for benchmark in config.benchmarks]
    return steps.tune(run, mixed, names, ratio, base, steps.render_all(run, mixed))
