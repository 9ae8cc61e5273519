"""Healing: general recovery of a pruned model before tailoring, by distillation on plain text."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tailored_llama.config import Work, check_training
from tailored_llama.models import add_adapter, load_base, merge_adapter, read_id_table, save_adapter
from tailored_llama.store import write_table
from tailored_llama.training.loop import Course, Material, train
from tailored_llama.training.losses import Objective, TextSamples
from tailored_llama.training.processes import in_processes
from tailored_llama.training.records import LOG, LOG_SCHEMA
from tailored_llama.training.settings import HealSettings


def heal(pruned: Path, teacher: Path, *, settings: HealSettings, work: Work) -> dict[str, Any]:
    """Stage: train an adapter towards the dense model's next-token distributions, merge it, write `log.parquet`.

    The loss is the mean divergence from the teacher over every position of the text, which is read once in random
    order. Deterministic for a seed on a CPU.

    Args:
        pruned: the pruned model.
        teacher: the output of `distillation.teach` for the text.
        settings: of them, quantization holds while the adapter is trained; it is merged into the weights as they are.

    Raises:
        InputError: the model cannot be quantised here, or streaming is demanded.
        FloatingPointError: the loss is not finite; the message names the step.
    """
    check_training("healing", settings.training, work.execution)
    with tempfile.TemporaryDirectory() as folder:
        measured = in_processes(partial(_train, pruned, teacher, settings), replace(work, out=Path(folder)))
        merge_adapter(pruned, Path(folder), out=work.out)  # loads the checkpoint again, unquantised
        shutil.copyfile(Path(folder) / LOG, work.out / LOG)
    return measured


def _train(pruned: Path, teacher: Path, settings: HealSettings, work: Work) -> dict[str, Any]:
    """Write the trained adapter and its log, in one process or in each of several."""
    training, execution = settings.training, work.execution
    torch.manual_seed(settings.seed)
    base = load_base(pruned, settings.quantization, training, execution, work.out, "healing")
    model = add_adapter(base, training, execution)
    objective = Objective(distillation=1.0, temperature=settings.temperature)
    material = Material(TextSamples(teacher, read_id_table(pruned)))
    log, measured, _ = train(model, material, training, objective, Course(settings.seed), work)
    save_adapter(model, pruned, work.out)
    write_table(work.out / LOG, log, LOG_SCHEMA)
    return measured
