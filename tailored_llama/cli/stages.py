"""Helpers for the commands: stages chained on scratch folders, and output written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tailored_llama.cli.folders import subfolder
from tailored_llama.config import (
    PROMPTS,
    BenchmarkConfig,
    RunConfig,
    drops_layers,
    reads_calibration,
    reserved_tokens,
    step_ratios,
    trims_vocabulary,
    validate_config,
)
from tailored_llama.console import progress_bar
from tailored_llama.data import RenderedSplit, benchmarks, calibration, check_benchmark, prompts
from tailored_llama.models import check_teacher, read_structure
from tailored_llama.pruning import groups, importance, plan_kept, plan_vocabulary, read_groups, vocabulary
from tailored_llama.pruning import prune as pruning
from tailored_llama.training import distillation


def find_benchmark(run: RunConfig, name: str) -> BenchmarkConfig:
    """A benchmark as the run configures it, or one of the seven."""
    configured = [benchmark for benchmark in run.benchmarks if benchmark.name == name]
    (benchmark,) = configured or validate_config({"benchmarks": [name]}).benchmarks
    check_benchmark(benchmark)
    return benchmark


def render(run: RunConfig, benchmark: BenchmarkConfig, split: RenderedSplit, work: Path, further: int = 0) -> Path:
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
        **prompts.split_sizes(run, split, further),
    )
    return rendered


def calibration_sequences(run: RunConfig, dense: Path, new: Callable[[str], Path]) -> Path:
    """Write the calibration sequences of a run into a new scratch folder."""
    sources = run.benchmarks if run.calibration.reads(PROMPTS) else ()
    rendered = [render(run, benchmark, "train", new(f"prompts-{benchmark.name}")) for benchmark in sources]
    sequences = new("calibration")
    calibration.load_calibration(
        dense, rendered, calibration=run.calibration, downloads=run.store.downloads, seed=run.seed, out=sequences
    )
    return sequences


def teach(run: RunConfig, dense: Path, source: Path, out: Path, checkpoint: Path) -> Path:
    """Write the teacher outputs of a dense model on calibration sequences or prompts into `out`, for a checkpoint."""
    check_teacher(dense, checkpoint)
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


def train_prompts(run: RunConfig, names: Sequence[str], new: Callable[[str], Path]) -> list[Path]:
    """Render the train prompts of the named benchmarks; without names, of the run's if they are its text, else none."""
    benchmarks = [find_benchmark(run, name) for name in names]
    if not names and run.calibration.reads(PROMPTS):
        benchmarks = list(run.benchmarks)
    return [render(run, benchmark, "train", new(f"train-{benchmark.name}")) for benchmark in benchmarks]


def token_counts(run: RunConfig, dense: Path, names: Sequence[str], new: Callable[[str], Path]) -> Path | None:
    """Count the tokens of the calibration text and of the named benchmarks' train prompts, if tokens are to leave."""
    if not trims_vocabulary(run):
        return None
    out, downloads = new("counts"), run.store.downloads
    read = train_prompts(run, names, new)
    vocabulary.count_tokens(dense, read, calibration=run.calibration, downloads=downloads, out=out)
    return out


def prune_in_steps(
    run: RunConfig, dense: Path, ratio: float, new: Callable[[str], Path], out: Path, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Run all stages of pruning, step by step; intermediate results go into new scratch folders.

    Args:
        names: benchmarks whose train prompts count for the kind vocabulary.

    Returns:
        The figures of the last step.
    """
    original, facts = read_structure(dense).size, dict[str, Any]()
    counts = token_counts(run, dense, names, new)
    text = calibration_sequences(run, dense, new) if reads_calibration(run) else None
    model = dense
    for step, share in enumerate(step_ratios(ratio, run.pruning.steps), start=1):
        graph, scores = new(f"groups-{step}"), new(f"importance-{step}")
        groups.build_graph(model, out=graph)
        if step == 1:  # fail before any heavy work if the ratio is out of reach
            table = read_groups(graph)
            tokens = plan_vocabulary(model, counts, ratio, run.pruning) if counts else None
            method = run.reconstruction.method
            plan_kept(model, table, np.zeros(len(table)), ratio, run.pruning, method, None, tokens)
        with progress_bar(f"importance {run.pruning.criterion}") as progress:
            importance.score_importance(
                model,
                graph,
                text,
                criterion=run.pruning.criterion,
                seed=run.seed,
                out=scores,
                execution=run.execution,
                influence=drops_layers(run),
                progress=progress,
            )
        target = out if step == run.pruning.steps else new(f"pruned-{step}")
        with progress_bar(f"prune @ {share:.3g}") as progress:
            facts = pruning.prune(
                model,
                graph,
                scores,
                text,
                ratio=share,
                pruning=run.pruning,
                reconstruction=run.reconstruction,
                counts=counts,
                original=original,
                out=target,
                execution=run.execution,
                progress=progress,
            )
        model = target
    return facts
