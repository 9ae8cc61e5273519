"""Healing: general recovery of a pruned model before tailoring, by distillation on plain text."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tailored_llama import models
from tailored_llama.config import Work, check_training
from tailored_llama.training.distillation import Teacher
from tailored_llama.training.loop import Course, train
from tailored_llama.training.losses import TextSamples
from tailored_llama.training.processes import gather, in_processes, on_first, rank_and_count, trained
from tailored_llama.training.records import LOG
from tailored_llama.training.settings import HealSettings

WEIGHTS = "weights.safetensors"  # of a training of all weights, by their names in the model


def heal(pruned: Path, teacher: Path, *, settings: HealSettings, work: Work) -> dict[str, Any]:
    """Stage: train towards the dense model's next-token distributions; write the healed model and `log.parquet`.

    An adapter is trained, on the quantised model if so set, and merged into the weights as they are. Or all weights are
    trained. The loss is the mean divergence from the teacher over every position of the text, which is read once in
    random order. The last sequences are held out: healing ends when the divergence on them does not fall any more.
    Deterministic for a seed on a CPU.

    Raises:
        InputError: the model cannot be quantised here, streaming is demanded, or all weights need more memory than is
            free.
        FloatingPointError: the loss is not finite; the message names the step.
    """
    check_training("healing", settings.training, work.execution)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        measured = in_processes(partial(_train, pruned, teacher, settings), replace(work, out=scratch))
        if settings.training.variant == "full":
            model = models.load_model(pruned)
            model.load_state_dict(load_file(scratch / WEIGHTS), strict=False)  # a tied head is in the file once
            models.save_changed(model, pruned, work.out)
        else:
            models.merge_adapter(pruned, scratch, out=work.out)
        shutil.copyfile(scratch / LOG, work.out / LOG)
    return measured


def _train(pruned: Path, teacher: Path, settings: HealSettings, work: Work) -> dict[str, Any]:
    """Write the trained adapter, or all weights, and the log, in one process or in each of several."""
    training, execution, full = settings.training, work.execution, settings.training.variant == "full"
    torch.manual_seed(settings.seed)
    base = models.load_base(pruned, settings.quantization, training, execution, work.out, "healing")
    if full and rank_and_count()[1] == 1:  # several devices were asked before the run
        models.check_whole_training(models.read_structure(pruned).parameters, str(base.device))
    model = base.float().requires_grad_(True) if full else models.add_adapter(base, training, execution)
    if full and execution.recompute_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    outputs, table = Teacher(teacher), models.read_id_table(pruned)
    texts = range(len(outputs))
    trained_on = len(texts) - min(settings.held_out, len(texts) // 10)
    samples, held_out = (TextSamples(outputs, table, own) for own in (texts[:trained_on], texts[trained_on:]))
    # Another copy of all weights would be much, so the last ones are kept.
    course = Course(samples, held_out, settings.seed, patience=2, checks=10, keeps_best=False)
    measured, _ = train(model, course, training, work)
    if full:
        save_file(on_first(trained(model)), work.out / WEIGHTS)
    else:
        gather(model)
        models.save_adapter(model, pruned, work.out)
    return measured
