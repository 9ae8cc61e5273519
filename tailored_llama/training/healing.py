"""Healing: general recovery of a pruned model before tailoring, by distillation on plain text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from tailored_llama.config import Work
from tailored_llama.models import add_adapter, load_base, merge_adapter, read_id_table, save_adapter
from tailored_llama.store import write_table
from tailored_llama.training.loop import Course, Material, train
from tailored_llama.training.losses import Objective, TextSamples
from tailored_llama.training.records import LOG_SCHEMA
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
    training, execution = settings.training, work.execution
    torch.manual_seed(settings.seed)
    base = load_base(pruned, settings.quantization, training, execution, work.out, "healing")
    model = add_adapter(base, training, execution)
    objective = Objective(distillation=1.0, temperature=settings.temperature)
    course = Course(settings.seed, resume=work.resume, every=execution.keep_state_every)
    material = Material(TextSamples(teacher, read_id_table(pruned)))
    log, measured, _ = train(model, material, training, objective, course, work.progress)
    with tempfile.TemporaryDirectory() as adapter:
        save_adapter(model, pruned, Path(adapter))
        del base, model  # merging loads the checkpoint again
        merge_adapter(pruned, Path(adapter), out=work.out)
    write_table(work.out / "log.parquet", log, LOG_SCHEMA)
    return measured
