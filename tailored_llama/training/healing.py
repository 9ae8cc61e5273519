"""Healing: general recovery of a pruned model before tailoring, by distillation on plain text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from tailored_llama.config import DistillationConfig, ExecutionConfig, HealingConfig, Quantization, RunConfig
from tailored_llama.models import add_adapter, load_base, merge_adapter, read_id_table, save_adapter
from tailored_llama.progress import Progress, silent
from tailored_llama.training.loop import Course, Material, train, write_log
from tailored_llama.training.losses import Objective, TextSamples

STAGE, VERSION = "healed", 1


def key_fields(config: RunConfig) -> dict[str, Any]:
    """What a healed checkpoint depends on, beside the pruned one and the teacher outputs, which say what text."""
    fields = config.healing.model_dump(mode="json", exclude={"tokens", "source"})
    fields |= {"temperature": config.distillation.temperature, "seed": config.seed}
    quantization = config.model.quantization
    return fields | ({"quantization": quantization} if quantization != "none" else {})


def heal(
    checkpoint: Path,
    teacher: Path,
    *,
    healing: HealingConfig,
    distillation: DistillationConfig,
    seed: int,
    out: Path,
    execution: ExecutionConfig,
    quantization: Quantization = "none",
    resume: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: train an adapter towards the dense model's next-token distributions, merge it, write `log.parquet`.

    The loss is the mean divergence from the teacher over every position of the text, which is read once in random
    order. Deterministic for a seed on a CPU.

    Args:
        checkpoint: the pruned model.
        teacher: the output of `distillation.teach` for the text.
        healing: adapter and optimiser.
        distillation: temperature of the teacher's distributions.
        seed: of the adapter, the order and dropout.
        out: an existing folder.
        execution: the device.
        quantization: of the model while the adapter is trained on it; it is merged into the weights as they are.
        resume: a folder with the state of this healing, to continue from after a kill.
        progress: called after every step.

    Raises:
        InputError: the model cannot be quantised here, or streaming is demanded.
        FloatingPointError: the loss is not finite; the message names the step.
    """
    torch.manual_seed(seed)
    base = load_base(checkpoint, quantization, healing, execution, out, "healing")
    model = add_adapter(base, healing, execution)
    objective = Objective(distillation=1.0, temperature=distillation.temperature)
    course = Course(seed, resume=resume, every=execution.keep_state_every)
    material = Material(TextSamples(teacher, read_id_table(checkpoint)))
    log, measured, _ = train(model, material, healing, objective, course, progress)
    with tempfile.TemporaryDirectory() as adapter:
        save_adapter(model, checkpoint, Path(adapter))
        del base, model  # merging loads the checkpoint again
        merge_adapter(checkpoint, Path(adapter), out=out)
    write_log(log, out)
    return measured
