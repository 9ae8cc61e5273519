"""Healing: general recovery of a pruned model before it is tailored, by distillation on plain text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from tailored_llama.adapters import adapted, save_adapter
from tailored_llama.config import DistillationConfig, ExecutionConfig, HealingConfig, RunConfig
from tailored_llama.models import load, merge
from tailored_llama.progress import Progress, silent
from tailored_llama.training import Objective, text_samples, train, write_log


def healing_text(run: RunConfig) -> RunConfig:
    """The run with as much calibration text as healing reads."""
    samples = -(-run.healing.tokens // run.calibration.tokens)
    return run.model_copy(update={"calibration": run.calibration.model_copy(update={"samples": samples})})


def heal(
    checkpoint: Path,
    teacher: Path,
    healing: HealingConfig,
    distillation: DistillationConfig,
    seed: int,
    out: Path,
    execution: ExecutionConfig,
    progress: Progress = silent,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Stage: train an adapter towards the dense model's next-token distributions, and merge it; with `log.parquet`.

    The loss is the mean divergence from the teacher over every position of the text, read once in random order.
    Deterministic by seed on a CPU.

    Args:
        checkpoint: the pruned model.
        teacher: what `distillation.teach` wrote of the text.
        healing: adapter and optimiser.
        distillation: the temperature the teacher was asked at.
        seed: of the adapter, the order and dropout.
        out: an existing folder.
        execution: the device.
        progress: told of every step.
        resume: a folder of this very healing's state, from which it goes on where it was killed.

    Raises:
        FloatingPointError: the loss is not a finite number; the step is named.
    """
    torch.manual_seed(seed)
    model = adapted(load(checkpoint, device=execution.device), healing, execution)
    objective = Objective(distillation=1.0, temperature=distillation.temperature)
    every = execution.keep_state_every
    log, measured = train(model, text_samples(teacher), healing, objective, seed, progress, resume=resume, every=every)
    with tempfile.TemporaryDirectory() as adapter:
        save_adapter(model, checkpoint, Path(adapter))
        del model  # merging loads the checkpoint again
        merge(checkpoint, Path(adapter), out)
    write_log(log, out)
    return measured
