"""Adapter training: the loss of packed examples, micro-batches that fit into memory, and the loop."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tailored_llama.config import TrainingConfig
from tailored_llama.data import Encoded
from tailored_llama.errors import InputError
from tailored_llama.memory import out_of_memory
from tailored_llama.models import (
    Document,
    IdTable,
    batches,
    halved,
    head_logits,
    learnt_header,
    packed_attention,
    packed_states,
    within_memory,
)
from tailored_llama.progress import Progress
from tailored_llama.store import write_table
from tailored_llama.training.alignment import in_pieces
from tailored_llama.training.distillation import SoftTargets, divergence, read_teacher
from tailored_llama.training.state import State, load_state, save_state

_log = logging.getLogger(__name__)

LOG_SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "epoch": pa.int32(),
        "loss": pa.float64(),
        "divergence": pa.float64(),  # from the teacher, unweighted; part of the loss
        "learning_rate": pa.float64(),
        "held_out_loss": pa.float64(),  # at the last step of an epoch, and before the first
    }
)


@dataclass(frozen=True)
class Sample:
    """One training sample: an example's right choice, all its choices if they are ranked or unlabelled, or text."""

    encoded: Encoded
    answer: int = 0
    scales: tuple[float, ...] = ()  # by choice: makes their log-likelihoods comparable; empty: plain text
    teacher: SoftTargets | None = None  # along the prefix and the right choice
    soft_label: tuple[float, ...] = ()  # the dense model's log-likelihood of every choice, of an unlabelled example

    def __len__(self) -> int:
        return len(self.encoded.document)

    def sequence(self) -> list[int]:
        """Token ids of the prefix and the right choice."""
        document = self.encoded.document
        return [*document.prefix, *(document.branches[self.answer] if document.branches else ())]

    def positions(self) -> list[int]:
        """Positions of `sequence` in the packed document."""
        return [self.encoded.document.offset(self.answer, i) for i in range(len(self.sequence()))]


@dataclass(frozen=True)
class Objective:
    """Weights of the loss terms, and the temperature of the divergence; see `sample_losses`."""

    ranking: float = 0.0
    distillation: float = 0.0
    temperature: float = 1.0


def with_teacher(samples: Sequence[Sample], teacher: Path, table: IdTable | None = None) -> list[Sample]:
    """Add to each sample the teacher outputs that `distillation.teach` wrote for it, in the same order.

    `table` leads from the teacher's tokens to the samples', if the vocabulary was trimmed.

    Raises:
        InputError: the teacher read other tokens, or another text.
    """
    outputs = read_teacher(teacher)
    if table and len(outputs) == len(samples):
        outputs = [in_pieces(out, table, own.sequence()) for out, own in zip(outputs, samples, strict=True)]
    if [sample.sequence() for sample in samples] != [list(targets.input_ids) for targets in outputs]:
        raise InputError(
            f"teacher {teacher}: got outputs along other tokens; allowed: those of `teach` for the same prompts and "
            "the same tokenizer"
        )
    return [replace(sample, teacher=targets) for sample, targets in zip(samples, outputs, strict=True)]


def text_samples(teacher: Path, table: IdTable | None = None) -> list[Sample]:
    """Every sequence of a text as a sample with its teacher outputs (`distillation.teach`); `table` as above."""
    outputs = read_teacher(teacher)
    outputs = [in_pieces(targets, table) for targets in outputs] if table else outputs
    return [Sample(Encoded(Document(t.input_ids), (), ()), teacher=t) for t in outputs]


def sample_losses(model: Any, batch: Sequence[Sample], objective: Objective) -> Iterator[tuple[Tensor, Tensor]]:
    """Loss of every sample of a packed row, and the unweighted divergence in it.

    An example's loss is the mean negative log-likelihood of its right continuation's tokens. If its choices are ranked,
    the cross-entropy over them times `ranking` is added. If it has a teacher, the divergence from it times
    `distillation` is added. Plain text has only the divergence. An unlabelled example's loss is the divergence from the
    dense model's distribution over its choices, which has no weight.
    """
    states, starts, choices = choice_losses(model, batch)
    for start, sample, own in zip(starts, batch, choices, strict=True):
        if sample.soft_label:
            distance = _choice_divergence(own, sample, objective.temperature)
            yield distance, distance
            continue
        loss = _choice_loss(own, sample, objective.ranking)
        distance = states.new_zeros((), dtype=torch.float32)
        if sample.teacher is not None and objective.distillation:
            sequence_states = states[[start + position for position in sample.positions()]]
            distance = divergence(model, sequence_states, sample.teacher, objective.temperature)
        yield loss + objective.distillation * distance, distance


def choice_losses(model: Any, batch: Sequence[Sample]) -> tuple[Tensor, list[int], list[list[Tensor]]]:
    """One forward pass over a packed row.

    Returns:
        The head's inputs along the row, [tokens, hidden]; where each sample starts; and for each sample the negative
        log-likelihoods of every choice's tokens, in nats.
    """
    documents = [sample.encoded.document for sample in batch]
    states = packed_states(model, documents, torch.arange(sum(map(len, documents))), learnt_header(model))
    starts = list(itertools.accumulate(map(len, documents), initial=0))[:-1]
    positions: list[int] = []
    targets: list[int] = []
    sizes: list[int] = []  # tokens per choice
    for start, sample in zip(starts, batch, strict=True):
        for offsets, tokens in zip(sample.encoded.positions, sample.encoded.targets, strict=True):
            positions += [start + offset for offset in offsets]
            targets += tokens
            sizes.append(len(tokens))
    logits = head_logits(model, states[positions]).float()  # all choices at once, so that the head is read only once
    losses = cross_entropy(logits, torch.tensor(targets, dtype=torch.int64, device=logits.device), reduction="none")
    parts = iter(losses.split(sizes))
    return states, starts, [[next(parts) for _ in sample.scales] for sample in batch]


def _choice_loss(choices: Sequence[Tensor], sample: Sample, ranking: float) -> Tensor:
    """Loss of an example, from the losses of its choices' tokens."""
    if not choices:
        return torch.zeros(())
    loss = choices[sample.answer].mean()
    if ranking and len(choices) > 1:
        scores = choice_scores(choices, sample)
        loss = loss + ranking * cross_entropy(scores, torch.tensor(sample.answer, device=scores.device))
    return loss


def choice_scores(choices: Sequence[Tensor], sample: Sample) -> Tensor:
    """Log-likelihoods of an example's choices, scaled as its metric compares them: [choices]."""
    return torch.stack([-c.sum() * scale for c, scale in zip(choices, sample.scales, strict=True)])


def _choice_divergence(choices: Sequence[Tensor], sample: Sample, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the dense model's distribution over the choices, in nats, times temperature²."""
    student = (choice_scores(choices, sample) / temperature).log_softmax(0)
    logits = torch.tensor(sample.soft_label) * torch.tensor(sample.scales)
    teacher = (logits / temperature).log_softmax(0).to(student.device)
    return (teacher.exp() * (teacher - student)).sum() * temperature**2


def _add_gradients(
    model: Any, batch: Sequence[Sample], shares: Sequence[float], training: TrainingConfig, objective: Objective
) -> tuple[float, float]:
    """Backward pass of a micro-batch, in its own function so that the graph of a pass that did not fit is freed."""
    with autocast(model, training):
        pairs = list(sample_losses(model, batch, objective))
        total = torch.stack([share * loss for share, (loss, _) in zip(shares, pairs, strict=True)]).sum()
    total.backward()
    return total.item(), sum(share * distance.item() for share, (_, distance) in zip(shares, pairs, strict=True))


def autocast(model: Any, training: TrainingConfig) -> torch.autocast:
    """Matrix products in the configured precision."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=training.precision == "bfloat16")


def _backward(
    model: Any,
    batch: Sequence[Sample],
    shares: Sequence[float],
    training: TrainingConfig,
    objective: Objective,
    budget: int,
) -> tuple[float, float, int]:
    """Accumulate the gradients of a step in micro-batches; when memory runs out, halve them and start the step again.

    Args:
        shares: weight of each sample's loss.
        budget: tokens per micro-batch.

    Returns:
        The loss, the divergence in it, and the tokens per micro-batch that did fit.
    """
    while True:
        loss = distance = 0.0
        parts = batches([len(sample) for sample in batch], budget)
        try:
            for part in parts:
                samples, weights = [batch[i] for i in part], [shares[i] for i in part]
                sums = _add_gradients(model, samples, weights, training, objective)
                loss, distance = loss + sums[0], distance + sums[1]
            return loss, distance, budget
        except (RuntimeError, MemoryError) as error:
            if len(parts) == len(batch) or not out_of_memory(error):
                raise
        model.zero_grad()  # drop the gradients of the parts that did fit
        budget = halved(min(budget, max(sum(len(batch[i]) for i in part) for part in parts)))


def _held_out_loss(
    model: Any, samples: Sequence[Sample], training: TrainingConfig, objective: Objective, budget: int
) -> float:
    model.eval()

    def part_loss(part: list[int]) -> float:
        with autocast(model, training):
            return sum(float(loss) for loss, _ in sample_losses(model, [samples[i] for i in part], objective))

    with torch.inference_mode():
        total = sum(loss for _, loss in within_memory([len(sample) for sample in samples], budget, part_loss))
    return total / len(samples)


def train(
    model: Any,
    samples: Sequence[Sample],
    training: TrainingConfig,
    objective: Objective,
    seed: int,
    progress: Progress,
    *,
    epochs: int = 1,
    held_out: Sequence[Sample] = (),
    patience: int = 1,
    texts: Sequence[Sample] = (),
    texts_per_step: int = 0,
    resume: Path | None = None,
    every: int = 0,
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Train an adapter and keep the one with the lowest held-out loss, the untrained one included.

    Samples come in random order, `batch_size` per step. The loss of a step is the mean over them, plus the mean over
    `texts_per_step` of the texts, which are cycled through. Deterministic for a seed on a CPU.

    Args:
        model: the output of `add_adapter`, its random weights already seeded.
        samples: the training samples.
        training: adapter and optimiser.
        objective: weights and temperature of the loss.
        seed: of the order.
        progress: called after every step.
        epochs: most passes over the samples.
        held_out: samples for early stopping, evaluated without a teacher; empty: no stopping.
        patience: epochs without a lower held-out loss before training stops.
        texts: further samples.
        texts_per_step: number of texts added to the samples of a step.
        resume: a folder for the state of this training; a state that it already has is resumed.
        every: steps between two saved states; 0: none.

    Returns:
        The columns of `log.parquet`, and the measurements: tokens, tokens/s, epochs.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step.
    """
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=training.learning_rate)
    per_epoch = math.ceil(len(samples) / training.batch_size)
    steps, tokens, started = per_epoch * epochs, 0, time.perf_counter()
    soft = any(sample.soft_label for sample in samples)
    state = State(training.micro_batch_tokens, math.inf, _copy(model), {name: [] for name in LOG_SCHEMA.names})
    if resume:
        load_state(resume, state, model, optimiser)
    with packed_attention(model.get_base_model()):
        if held_out and not state.step:
            state.best = _held_out_loss(model, held_out, training, objective, state.budget)
            tokens += sum(map(len, held_out))
            _append(state.log, step=0, epoch=0, held_out_loss=state.best)
        while state.step < steps and state.worse < patience:
            epoch, position = divmod(state.step, per_epoch)
            state.step += 1
            rate = learning_rate(state.step, steps, training)
            for group in optimiser.param_groups:
                group["lr"] = rate
            first = position * training.batch_size
            batch = [samples[i] for i in _order(len(samples), seed, epoch)[first : first + training.batch_size]]
            shares = [1 / len(batch)] * len(batch)
            if step_texts := _texts_of_step(texts, texts_per_step, seed, state.step):
                batch, shares = batch + step_texts, shares + [1 / len(step_texts)] * len(step_texts)
            model.train()
            loss, distance, state.budget = _backward(model, batch, shares, training, objective, state.budget)
            if not math.isfinite(loss):
                raise FloatingPointError(f"training: loss is {loss} at step {state.step} of {steps}")
            optimiser.step()
            optimiser.zero_grad()
            tokens += sum(map(len, batch))
            logged = distance if objective.distillation or soft else None
            _append(state.log, step=state.step, epoch=epoch + 1, loss=loss, divergence=logged, learning_rate=rate)
            progress(state.step, steps)
            if not held_out and state.step % math.ceil(steps / 10) == 0:
                _log.info("step %d of %d: loss %.4f", state.step, steps, loss)
            if held_out and position + 1 == per_epoch:
                held = state.log["held_out_loss"][-1] = _held_out_loss(
                    model, held_out, training, objective, state.budget
                )
                tokens += sum(map(len, held_out))
                _log.info("epoch %d of %d: loss %.4f, held out %.4f", epoch + 1, epochs, loss, held)
                if held < state.best:
                    state.best, state.best_adapter, state.worse = held, _copy(model), 0
                else:
                    state.worse += 1
            if resume and every and state.step % every == 0:
                save_state(resume, state, model, optimiser)
    if held_out:
        from peft import set_peft_model_state_dict  # late: it brings bitsandbytes, where that is installed

        set_peft_model_state_dict(model, state.best_adapter)
    progress(steps, steps)
    tokens_per_second = round(tokens / (time.perf_counter() - started), 1)
    return state.log, {"tokens": tokens, "tokens_per_second": tokens_per_second, "epochs": max(state.log["epoch"])}


def _order(count: int, *seed: int) -> list[int]:
    """A random order that depends on the seed alone, so that a resumed training finds it again."""
    return [int(i) for i in np.random.default_rng(seed).permutation(count)]


def _texts_of_step(texts: Sequence[Sample], count: int, seed: int, step: int) -> list[Sample]:
    """The texts of one step; each cycle goes through all texts in a new random order."""
    if not texts:
        return []
    positions = (divmod(i, len(texts)) for i in range((step - 1) * count, step * count))
    return [texts[_order(len(texts), seed, cycle, 1)[position]] for cycle, position in positions]


def learning_rate(step: int, steps: int, training: TrainingConfig) -> float:
    """Linear warm-up, then a half cosine to zero, or constant; steps count from 1."""
    warmup = round(training.warmup * steps)
    if step <= warmup:
        return training.learning_rate * step / warmup
    if training.schedule == "constant":
        return training.learning_rate
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup - 1) / max(1, steps - warmup)))


def _copy(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict  # late, as above

    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def _append(log: dict[str, list[Any]], **row: Any) -> None:
    for name, column in log.items():
        column.append(row.get(name))


def write_log(log: dict[str, list[Any]], out: Path) -> None:
    """Write `log.parquet`."""
    write_table(out / "log.parquet", log, LOG_SCHEMA)
