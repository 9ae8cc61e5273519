"""Tuning: LoRA on a few examples of one benchmark or several (arXiv 2410.19185, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tailored_llama.config import (
    SOFT,
    WRITTEN,
    DistillationConfig,
    ExecutionConfig,
    Metric,
    Quantization,
    RunConfig,
    TuningConfig,
    part_of,
    reserved_tokens,
)
from tailored_llama.data import Prompt, encode_answer, encode_prompt, read_prompts
from tailored_llama.errors import InputError
from tailored_llama.models import add_adapter, load_base, load_tokenizer, read_id_table, save_adapter
from tailored_llama.progress import Progress, silent
from tailored_llama.training.held_out import Comparison, is_better, outcomes, write_comparison
from tailored_llama.training.loop import Course, Material, train, write_log
from tailored_llama.training.losses import Objective, Sample, TextSamples, with_teacher


@dataclass(frozen=True)
class Source:
    """Train prompts of a benchmark, its headline metric, and the dense model's outputs along the shots, if any."""

    prompts: Path
    metric: Metric
    teacher: Path | None = None


STAGE, VERSION = "adapter", 6


def key_fields(config: RunConfig, metrics: Mapping[str, Metric], taught: bool, text: bool) -> dict[str, Any]:
    """What an adapter depends on, beside the checkpoint, the prompts and the teacher outputs.

    Args:
        config: the run's.
        metrics: the headline metric of every benchmark that is tuned on.
        taught: whether there are teacher outputs along the shots.
        text: whether there are teacher outputs along the calibration text.
    """
    tuning, distillation = config.tuning, config.distillation
    unread = {"shots", "held_out", "examples", "keep", "dense"}
    unread |= {"rank", "alpha", "dropout", "targets"} if tuning.variant in SOFT else {"virtual_tokens"}
    if not tuning.held_out:
        unread.add("patience")
    fields = tuning.model_dump(mode="json", exclude=unread) | {"seed": config.seed}
    if tuning.held_out:
        fields["metrics"] = dict(metrics)
    if len(metrics) > 1:  # each gives a part of the examples, the first ones perhaps one more
        fields |= {"shots": tuning.shots, "held_out": tuning.held_out, "order": list(metrics)}
    if taught:
        fields |= {"weight": distillation.weight, "temperature": distillation.temperature}
    if text:
        fields["sequences"] = distillation.sequences
    if config.model.quantization != "none":
        fields["quantization"] = config.model.quantization
    return fields


def tune(
    checkpoint: Path,
    sources: Sequence[Source],
    text: Path | None = None,
    *,
    tuning: TuningConfig,
    distillation: DistillationConfig,
    seed: int,
    out: Path,
    execution: ExecutionConfig,
    quantization: Quantization = "none",
    resume: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: train one adapter; write it in PEFT's layout, with `log.parquet` and the digest of its base.

    The loss is the mean over examples of the mean negative log-likelihood of the right continuation's tokens. With a
    teacher, the divergence from it is added, times `distillation.weight`. The adapter kept is the one with the lowest
    loss, without divergence, on the held-out slice of the train split, the untrained one included. Deterministic for a
    seed on a CPU.

    What it does there to the metric goes to `held_out.parquet`, beside the model without it (`read_comparison`). Both
    are measured as they are trained: the adapter is attached, and the model may be quantised.

    Args:
        checkpoint: the model to tune.
        sources: the train prompts. Several sources each give an equal part of `tuning.shots` and `tuning.held_out`.
        text: the teacher outputs along the calibration text.
        tuning: shots, adapter, loss, optimiser.
        distillation: weight and temperature, if there are teacher outputs.
        seed: of the adapter, the order and dropout.
        out: an existing folder.
        execution: the device.
        quantization: of the model while the adapter is trained on it.
        resume: a folder with the state of this tuning, to continue from after a kill.
        progress: called after every step.

    Raises:
        InputError: a continuation is longer than the model's context, a teacher read other tokens, a soft prompt is set
            for a benchmark whose answers the model writes, the model cannot be quantised here, or streaming is
            demanded.
        FloatingPointError: the loss is not finite; the message names the step.
    """
    if tuning.variant in SOFT and (written := next((s.metric for s in sources if s.metric in WRITTEN), None)):
        raise InputError(
            f"tuning.variant: got {tuning.variant!r} for a benchmark with metric {written}; allowed: lora, rslora or "
            "dora if the model writes its answers"
        )
    torch.manual_seed(seed)
    base = load_base(checkpoint, quantization, tuning, execution, out, "tuning")
    tokenizer = load_tokenizer(checkpoint)
    limit = base.config.max_position_embeddings
    limit -= reserved_tokens(tuning)
    table = read_id_table(checkpoint)
    shots: list[Sample] = []
    held_out: list[Sample] = []  # with all their choices
    examples: list[int] = []
    for i, source in enumerate(sources):
        choices = source.metric if source.metric not in WRITTEN else None
        samples = [encode_sample(tokenizer, limit, None, prompt) for prompt in read_prompts(source.prompts, "shots")]
        samples = with_teacher(samples, source.teacher, table) if source.teacher else samples
        shots += samples[: part_of(tuning.shots, i, len(sources))]
        held = read_prompts(source.prompts, "held_out")[: part_of(tuning.held_out, i, len(sources))]
        held_out += [encode_sample(tokenizer, limit, choices, prompt) for prompt in held]
        examples += [prompt.example for prompt in held]
    # A soft prompt changes the model before it is trained; other adapters start as no change.
    untuned = outcomes(base, held_out, tuning, tuning.micro_batch_tokens) if tuning.variant in SOFT else None
    model = add_adapter(base, tuning, execution)
    texts = TextSamples(text, table) if text else ()
    material = Material(shots, held_out, texts, distillation.sequences)
    objective = Objective(distillation.weight, distillation.temperature)
    course = Course(seed, tuning.epochs, tuning.patience, resume, execution.keep_state_every)
    log, measured, (untrained, kept) = train(model, material, tuning, objective, course, progress)
    comparison = write_comparison(out, examples, untrained if untuned is None else untuned, kept)
    write_log(log, out)
    save_adapter(model, checkpoint, out)
    return measured | (_figures(comparison) if comparison else {})


def _figures(comparison: Comparison) -> dict[str, Any]:
    """The comparison as measurements of the stage, rounded, without what was not measured."""
    figures = {name: value for name, value in asdict(comparison).items() if name != "examples"}
    figures |= {"accuracy_gain": comparison.accuracy_gain, "loss_gain": comparison.loss_gain}
    named = {f"held_out_{name}": round(value, 4) for name, value in figures.items() if value is not None}
    return named | ({} if (better := is_better(comparison)) is None else {"better_than_untuned": better})


def encode_sample(tokenizer: Any, limit: int, ranked: Metric | None, prompt: Prompt) -> Sample:
    """Encode all choices of a prompt if a metric ranks them, else the right one alone."""
    right = prompt.answer
    if ranked is None:
        return Sample(encode_answer(tokenizer, prompt, limit), 0, (1.0,))
    return Sample(encode_prompt(tokenizer, prompt, limit), right, _scales(prompt, ranked))


def _scales(prompt: Prompt, metric: Metric) -> tuple[float, ...]:
    """What the log-likelihoods of the choices are multiplied by before they are compared."""
    lengths = prompt.choice_lengths if metric == "acc_norm" else (1,) * len(prompt.contexts)
    mean = sum(lengths) / len(lengths)
    return tuple(mean / length for length in lengths)
