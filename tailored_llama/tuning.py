"""Tuning: LoRA on a few examples of one benchmark, or of several (arXiv 2410.19185, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tailored_llama.adapters import adapted, save_adapter
from tailored_llama.config import SOFT, DistillationConfig, ExecutionConfig, Metric, TuningConfig, reserved_tokens
from tailored_llama.errors import InputError
from tailored_llama.models import load, load_tokenizer
from tailored_llama.own import WRITTEN
from tailored_llama.progress import Progress, silent
from tailored_llama.prompts import Prompt, read_prompts
from tailored_llama.scoring import encode_answer, encode_prompt
from tailored_llama.training import (
    Objective,
    Sample,
    text_samples,
    train,
    with_teacher,
    write_log,
)


@dataclass(frozen=True)
class Source:
    """Train prompts of a benchmark, its headline metric, and what the dense model says along them, where asked."""

    prompts: Path
    metric: Metric
    teacher: Path | None = None


def tune(
    checkpoint: Path,
    sources: Sequence[Source],
    tuning: TuningConfig,
    seed: int,
    out: Path,
    execution: ExecutionConfig,
    progress: Progress = silent,
    distillation: DistillationConfig | None = None,
    text: Path | None = None,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Stage: train one adapter; write it in PEFT's layout, with `log.parquet` and the digest of its base.

    The loss is the mean over examples of the mean negative log-likelihood of the right continuation's tokens. With
    `tuning.ranking`, that times the cross-entropy over the choices is added: their log-likelihoods are the logits, for
    acc_norm divided by the choices' lengths and multiplied by the mean length. With a teacher, the divergence from it
    is added, times `distillation.weight`. The adapter kept is the one with the lowest loss, divergence left out, on the
    held-out slice of the train split, the untrained one included. Deterministic by seed on a CPU.

    Args:
        checkpoint: what is tuned.
        sources: the train prompts. Of several, each gives an equal part of `tuning.shots` and `tuning.held_out`.
        tuning: shots, adapter, loss, optimiser.
        seed: of the adapter, the order and dropout.
        out: an existing folder.
        execution: the device.
        progress: told of every step.
        distillation: weight and temperature, where sources have a teacher.
        text: what the dense model says along the calibration text (`distillation.teach`).
        resume: a folder of this very tuning's state, from which it goes on where it was killed.

    Raises:
        InputError: a continuation is longer than the model's context, a teacher read other tokens, or a soft prompt is
            asked for where the model writes its answers.
        FloatingPointError: the loss is not a finite number; the step is named.
    """
    if tuning.variant in SOFT and (written := next((s.metric for s in sources if s.metric in WRITTEN), None)):
        raise InputError(
            f"tuning.variant: got {tuning.variant!r} for a benchmark of metric {written}; allowed: lora, rslora or "
            "dora, where the model writes its answers"
        )
    torch.manual_seed(seed)
    base, tokenizer = load(checkpoint, device=execution.device), load_tokenizer(checkpoint)
    limit = base.config.max_position_embeddings
    limit -= reserved_tokens(tuning)
    shots: list[Sample] = []
    held_out: list[Sample] = []
    for i, source in enumerate(sources):
        ranked = source.metric if tuning.ranking and source.metric not in WRITTEN else None
        encode = partial(_sample, tokenizer, limit, ranked)
        mine = [encode(prompt) for prompt in read_prompts(source.prompts, "shots")]
        held = [encode(prompt) for prompt in read_prompts(source.prompts, "held_out")]
        mine = with_teacher(mine, source.teacher) if source.teacher else mine
        shots += mine[: _part(tuning.shots, i, len(sources))]
        held_out += held[: _part(tuning.held_out, i, len(sources))]
    model = adapted(base, tuning, execution)
    taught = distillation or DistillationConfig()
    log, measured = train(
        model,
        shots,
        tuning,
        Objective(tuning.ranking, taught.weight, taught.temperature),
        seed,
        progress,
        epochs=tuning.epochs,
        held_out=held_out,
        patience=tuning.patience,
        texts=text_samples(text) if text else (),
        texts_per_step=taught.sequences if text else 0,
        resume=resume,
        every=execution.keep_state_every,
    )
    write_log(log, out)
    save_adapter(model, checkpoint, out)
    return measured


def _part(total: int, i: int, parts: int) -> int:
    """The size of part i of `total` things dealt out to `parts`."""
    return total // parts + (i < total % parts)


def _sample(tokenizer: Any, limit: int, ranked: Metric | None, prompt: Prompt) -> Sample:
    """All choices where they are ranked by a metric, else the right one alone."""
    right = prompt.answer
    if ranked is None:
        return Sample(encode_answer(tokenizer, prompt, limit), 0, (1.0,))
    lengths = prompt.choice_lengths if ranked == "acc_norm" else (1,) * len(prompt.contexts)
    mean = sum(lengths) / len(lengths)
    return Sample(encode_prompt(tokenizer, prompt, limit), right, tuple(mean / length for length in lengths))
