"""Helpers for the commands: stages chained on scratch folders, and output written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tailored_llama.cli.folders import subfolder
from tailored_llama.config import (
    PROMPTS,
    BenchmarkConfig,
    RunConfig,
    drops_layers,
    reads_calibration,
    reserved_tokens,
    searches_widths,
    self_tokens,
    step_ratios,
    trims_vocabulary,
    unlabelled_of,
    validate_config,
)
from tailored_llama.console import progress_bar
from tailored_llama.data import RenderedSplit, benchmarks, calibration, check_benchmark, prompts, self_text
from tailored_llama.models import check_teacher, read_structure
from tailored_llama.pruning import allocation, check_ratio, groups, importance, vocabulary
from tailored_llama.pruning import prune as pruning
from tailored_llama.training import distillation, soft_labels


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


def write_text(run: RunConfig, dense: Path, new: Callable[[str], Path]) -> Path | None:
    """Have a dense model write the calibration text of the source `self` into a new scratch folder; None without it."""
    if not (tokens := self_tokens(run)):
        return None
    out, length = new("self-text"), run.calibration.tokens
    with progress_bar("write text") as progress:
        self_text.write_text(
            dense, tokens=tokens, length=length, seed=run.seed, out=out, execution=run.execution, progress=progress
        )
    return out


def calibration_sequences(run: RunConfig, dense: Path, new: Callable[[str], Path], written: Path | None = None) -> Path:
    """Write the calibration sequences of a run into a new scratch folder; `written` is the output of `write_text`."""
    sources = run.benchmarks if run.calibration.reads(PROMPTS) else ()
    rendered = [render(run, benchmark, "train", new(f"prompts-{benchmark.name}")) for benchmark in sources]
    sequences = new("calibration")
    calibration.load_calibration(
        dense,
        rendered,
        written or write_text(run, dense, new),
        calibration=run.calibration,
        downloads=run.store.downloads,
        seed=run.seed,
        out=sequences,
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


def soft_label(run: RunConfig, benchmark: BenchmarkConfig, dense: Path, new: Callable[[str], Path]) -> Path:
    """Write a dense model's soft labels of a benchmark's unlabelled prompts into a new scratch folder."""
    rendered = render(run, benchmark, "unlabelled", new("unlabelled"), unlabelled_of(run, benchmark.name))
    out = new("soft-labels")
    with progress_bar("soft-label") as progress:
        soft_labels.soft_label(dense, rendered, out=out, execution=run.execution, progress=progress)
    return out


def train_prompts(run: RunConfig, names: Sequence[str], new: Callable[[str], Path]) -> list[Path]:
    """Render the train prompts of the named benchmarks; without names, of the run's if they are its text, else none."""
    benchmarks = [find_benchmark(run, name) for name in names]
    if not names and run.calibration.reads(PROMPTS):
        benchmarks = list(run.benchmarks)
    return [render(run, benchmark, "train", new(f"train-{benchmark.name}")) for benchmark in benchmarks]


def token_counts(
    run: RunConfig, dense: Path, names: Sequence[str], new: Callable[[str], Path], written: Path | None
) -> Path | None:
    """Count the tokens of the calibration text and of the named benchmarks' train prompts, if tokens are to leave."""
    if not trims_vocabulary(run):
        return None
    out, downloads = new("counts"), run.store.downloads
    vocabulary.count_tokens(
        dense, train_prompts(run, names, new), written, calibration=run.calibration, downloads=downloads, out=out
    )
    return out


def prune_in_steps(
    run: RunConfig, dense: Path, ratio: float, new: Callable[[str], Path], out: Path, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Run all stages of pruning, step by step; intermediate results go into new scratch folders.

    Args:
        names: benchmarks whose train prompts count for the kind vocabulary, and are read by a search.

    Returns:
        The figures of the last step.
    """
    original, facts = read_structure(dense).size, dict[str, Any]()
    written = write_text(run, dense, new) if reads_calibration(run) or trims_vocabulary(run) else None
    counts = token_counts(run, dense, names, new, written)
    text = calibration_sequences(run, dense, new, written) if reads_calibration(run) else None
    model = dense
    for step, share in enumerate(step_ratios(ratio, run.pruning.steps), start=1):
        graph, scores = new(f"groups-{step}"), new(f"importance-{step}")
        groups.build_graph(model, out=graph)
        if step == 1:  # fail before any heavy work if the ratio is out of reach
            check_ratio(model, graph, counts, ratio, run)
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
        widths = None
        if searches_widths(run):
            assert text
            widths = new("allocation")
            with progress_bar(f"search @ {share:.3g}") as progress:
                allocation.search_widths(
                    model,
                    graph,
                    scores,
                    text,
                    train_prompts(run, names, new),
                    ratio=share,
                    pruning=run.pruning,
                    reconstruction=run.reconstruction,
                    seed=run.seed,
                    counts=counts,
                    out=widths,
                    execution=run.execution,
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
                allocation=widths,
                original=original,
                out=target,
                execution=run.execution,
                progress=progress,
            )
        model = target
    return facts
