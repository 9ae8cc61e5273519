"""Helpers for the commands: stages chained on scratch folders, and output written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tailored_llama.cli.folders import subfolder
from tailored_llama.config import (
    PROMPTS,
    BenchmarkConfig,
    RunConfig,
    reads_calibration,
    reserved_tokens,
    step_ratios,
    validate_config,
)
from tailored_llama.console import progress_bar
from tailored_llama.data import Split, benchmarks, calibration, prompts
from tailored_llama.models import read_structure
from tailored_llama.pruning import groups, importance, plan_kept, read_groups
from tailored_llama.pruning import prune as pruning
from tailored_llama.training import distillation


def find_benchmark(run: RunConfig, name: str) -> BenchmarkConfig:
    """A benchmark as the run configures it, or one of the seven."""
    configured = [benchmark for benchmark in run.benchmarks if benchmark.name == name]
    (benchmark,) = configured or validate_config({"benchmarks": [name]}).benchmarks
    benchmarks.check_benchmark(benchmark)
    return benchmark


def render(run: RunConfig, benchmark: BenchmarkConfig, split: Split, work: Path) -> Path:
    """Render the prompts of a benchmark's split into a folder below `work`."""
    examples, rendered = subfolder(work, "examples"), subfolder(work, "prompts")
    benchmarks.load_benchmark(benchmark, downloads=run.store.downloads, out=examples)
    prompts.render_prompts(
        examples,
        benchmark=benchmark,
        split=split,
        template=run.prompts.template,
        num_fewshot=run.scoring.num_fewshot,
        seed=run.seed,
        out=rendered,
        **prompts.split_sizes(run, split),
    )
    return rendered


def calibration_sequences(run: RunConfig, dense: Path, new: Callable[[str], Path]) -> Path:
    """Write the calibration sequences of a run into a new scratch folder."""
    sources = run.benchmarks if run.calibration.source == PROMPTS else ()
    rendered = [render(run, benchmark, "train", new(f"prompts-{benchmark.name}")) for benchmark in sources]
    sequences = new("calibration")
    calibration.load_calibration(
        dense, rendered, calibration=run.calibration, downloads=run.store.downloads, seed=run.seed, out=sequences
    )
    return sequences


def teach(run: RunConfig, dense: Path, source: Path, out: Path) -> Path:
    """Write the teacher outputs of a dense model on calibration sequences or prompts into `out`."""
    with progress_bar("teach") as progress:
        distillation.teach(
            dense,
            source,
            distillation=run.distillation,
            reserved=reserved_tokens(run.tuning),
            out=out,
            execution=run.execution,
            progress=progress,
        )
    return out


def prune_in_steps(run: RunConfig, dense: Path, ratio: float, new: Callable[[str], Path], out: Path) -> None:
    """Run all stages of pruning, step by step; intermediate results go into new scratch folders."""
    total = read_structure(dense).parameters
    text = calibration_sequences(run, dense, new) if reads_calibration(run) else None
    model = dense
    for step, share in enumerate(step_ratios(ratio, run.pruning.steps), start=1):
        graph, scores = new(f"groups-{step}"), new(f"importance-{step}")
        groups.build_graph(model, out=graph)
        if step == 1:  # fail before any heavy work if the ratio is out of reach
            table = read_groups(graph)
            plan_kept(model, table, np.zeros(len(table)), ratio, run.pruning, run.reconstruction.method)
        with progress_bar(f"importance {run.pruning.criterion}") as progress:
            importance.score_importance(
                model,
                graph,
                text,
                criterion=run.pruning.criterion,
                seed=run.seed,
                out=scores,
                execution=run.execution,
                progress=progress,
            )
        target = out if step == run.pruning.steps else new(f"pruned-{step}")
        with progress_bar(f"prune @ {share:.3g}") as progress:
            pruning.prune(
                model,
                graph,
                scores,
                text,
                ratio=share,
                pruning=run.pruning,
                reconstruction=run.reconstruction,
                original_parameters=total,
                out=target,
                execution=run.execution,
                progress=progress,
            )
        model = target
