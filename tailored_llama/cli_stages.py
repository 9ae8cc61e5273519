"""What stands behind the commands: stages chained on scratch folders, and folders that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tailored_llama import benchmarks, calibration, distillation, prompts, texts
from tailored_llama.checkpoints import read_structure
from tailored_llama.config import BenchmarkConfig, RunConfig, reads_calibration, reserved_tokens
from tailored_llama.config_loading import validate_config
from tailored_llama.console import progress_bar
from tailored_llama.errors import InputError
from tailored_llama.files import NO_ROOM, error_number
from tailored_llama.pruning import groups, importance
from tailored_llama.pruning import prune as pruning
from tailored_llama.pruning.prune import plan_kept, step_ratios


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it has been written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; allowed: a new or empty folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; allowed: a folder in a writable place") from None
    try:
        with scratch:
            folder = Path(scratch.name) / "new"
            folder.mkdir()
            yield folder
            if out.exists():
                out.rmdir()
            folder.rename(out)
    except Exception as error:
        if (number := error_number(error)) not in NO_ROOM:
            raise
        raise InputError(f"{out}: {os.strerror(number)}; allowed: a place with room") from error


def subfolder(parent: Path, name: str) -> Path:
    """A new folder of a name below another."""
    folder = parent / name
    folder.mkdir()
    return folder


def named_benchmark(run: RunConfig, name: str) -> BenchmarkConfig:
    """A benchmark as the run configures it, or one of the seven."""
    named = [b for b in run.benchmarks if b.name == name]
    (own,) = named or validate_config({"benchmarks": [name]}).benchmarks
    benchmarks.check_benchmark(own)
    return own


def render(run: RunConfig, benchmark: BenchmarkConfig, split: benchmarks.Split, work: Path) -> Path:
    """The prompts of a benchmark's split, rendered in a folder below `work`."""
    examples, rendered = work / "examples", work / "prompts"
    examples.mkdir()
    rendered.mkdir()
    benchmarks.load_benchmark(benchmark, run.store.downloads, examples)
    prompts.render_prompts(
        examples,
        benchmark,
        split,
        run.prompts.template,
        rendered,
        shots=run.tuning.shots,
        held_out=run.tuning.held_out,
        limit=run.scoring.limit,
        num_fewshot=run.scoring.num_fewshot,
        seed=run.seed,
    )
    return rendered


def calibration_sequences(run: RunConfig, dense: Path, new: Callable[[str], Path]) -> Path:
    """Calibration sequences of a run, in a new scratch folder."""
    named = run.benchmarks if run.calibration.source == texts.PROMPTS else ()
    rendered = [render(run, benchmark, "train", new(f"prompts-{benchmark.name}")) for benchmark in named]
    sequences = new("calibration")
    calibration.load_calibration(dense, run.calibration, run.store.downloads, run.seed, sequences, rendered)
    return sequences


def teach(run: RunConfig, dense: Path, source: Path, out: Path) -> Path:
    """What a dense model says along calibration sequences or prompts, in a new folder."""
    with progress_bar("teach") as progress:
        reserved = reserved_tokens(run.tuning)
        distillation.teach(dense, source, run.distillation, out, run.execution, progress, reserved)
    return out


def prune_in_steps(run: RunConfig, dense: Path, ratio: float, new: Callable[[str], Path], out: Path) -> None:
    """All stages of pruning, in steps; their artifacts go into new scratch folders."""
    total, criterion, reconstruction = read_structure(dense).parameters, run.pruning.criterion, run.reconstruction
    sequences = calibration_sequences(run, dense, new) if reads_calibration(run) else None
    model, device, most = dense, run.execution.device, run.execution.batch_tokens
    for step, share in enumerate(step_ratios(ratio, run.pruning.steps), start=1):
        graph, scores = new(f"groups-{step}"), new(f"importance-{step}")
        groups.build_graph(model, graph)
        if step == 1:  # can it be reached? before anything heavy
            found = groups.read_groups(graph)
            plan_kept(dense, found, np.zeros(len(found)), ratio, run.pruning, reconstruction.method)
        with progress_bar(f"importance {criterion}") as progress:
            importance.score_importance(model, sequences, graph, criterion, run.seed, scores, device, progress, most)
        last = step == run.pruning.steps
        target = out if last else new(f"pruned-{step}")
        with progress_bar(f"prune @ {share:.3g}") as progress:
            pruning.prune(
                model,
                graph,
                scores,
                share,
                run.pruning,
                reconstruction,
                sequences,
                target,
                total,
                device,
                progress,
                most,
            )
        model = target
