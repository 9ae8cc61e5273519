"""Adapter training: micro-batches that fit into memory, and the loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailored_llama.config import TrainingConfig
from tailored_llama.memory import out_of_memory
from tailored_llama.models import batches, halved, packed_attention
from tailored_llama.progress import Progress
from tailored_llama.training.losses import Objective, Sample, autocast, outcomes, sample_losses, training_loss
from tailored_llama.training.records import LOG_SCHEMA, Outcome
from tailored_llama.training.state import State, load_state, save_state

_log = logging.getLogger(__name__)

# Multiplications of one projection (tokens × hidden²) that keep a thread busy. On a CPU with fewer, threads wait for
# each other at every small operation for longer than they compute.
_PER_THREAD = 2**24


@dataclass(frozen=True)
class Material:
    """What is trained on.

    `samples` come in random order. `texts_per_step` of the texts, which are cycled through, are added to every step.
    `held_out` samples, with all their choices, are for early stopping, without a teacher; empty: no stopping.
    """

    samples: Sequence[Sample]
    held_out: Sequence[Sample] = ()
    texts: Sequence[Sample] = ()
    texts_per_step: int = 0

    def batch(self, step: int, size: int, seed: int) -> tuple[list[Sample], list[float]]:
        """The samples of a step, counted from 1, and the weights of their losses: the mean of each kind is 1."""
        epoch, position = divmod(step - 1, math.ceil(len(self.samples) / size))
        order = _order(len(self.samples), seed, epoch)[position * size : (position + 1) * size]
        batch, texts = [self.samples[i] for i in order], self._texts(step, seed)
        return batch + texts, [1 / len(batch)] * len(batch) + [1 / max(1, len(texts))] * len(texts)

    def _texts(self, step: int, seed: int) -> list[Sample]:
        """The texts of a step; each cycle goes through all texts in a new random order."""
        if not self.texts:
            return []
        count = self.texts_per_step
        positions = (divmod(i, len(self.texts)) for i in range((step - 1) * count, step * count))
        return [self.texts[_order(len(self.texts), seed, cycle, 1)[position]] for cycle, position in positions]


def _order(count: int, *seed: int) -> list[int]:
    """A random order that depends on the seed alone, so that a resumed training finds it again."""
    return [int(i) for i in np.random.default_rng(seed).permutation(count)]


@dataclass(frozen=True)
class Course:
    """The course of a training.

    It has at most `epochs` passes over the samples, in an order by `seed`, and stops after `patience` epochs without a
    lower held-out loss. `resume` is a folder for its state: one that is there already is resumed. `every` is the number
    of steps between two saved states; 0: none.
    """

    seed: int
    epochs: int = 1
    patience: int = 1
    resume: Path | None = None
    every: int = 0


def _add_gradients(
    model: Any, batch: Sequence[Sample], shares: Sequence[float], training: TrainingConfig, objective: Objective
) -> tuple[float, float]:
    """Backward pass of a micro-batch, in its own function so that the graph of a pass that did not fit is freed."""
    with autocast(model, training):
        pairs = list(sample_losses(model, batch, objective))
        total = torch.stack([share * loss for share, (loss, _) in zip(shares, pairs, strict=True)]).sum()
    total.backward()
    return total.item(), sum(share * distance.item() for share, (_, distance) in zip(shares, pairs, strict=True))


@contextmanager
def _busy_threads(model: Any, tokens: int) -> Iterator[None]:
    """On a CPU, use as many of torch's threads as a pass over so many tokens keeps busy."""
    before, width = torch.get_num_threads(), model.get_input_embeddings().weight.shape[1]
    if model.device.type == "cpu":
        torch.set_num_threads(min(before, max(1, tokens * width**2 // _PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
                with _busy_threads(model, sum(map(len, samples))):
                    sums = _add_gradients(model, samples, weights, training, objective)
                loss, distance = loss + sums[0], distance + sums[1]
            return loss, distance, budget
        except (RuntimeError, MemoryError) as error:
            if len(parts) == len(batch) or not out_of_memory(error):
                raise
        model.zero_grad()  # drop the gradients of the parts that did fit
        budget = halved(min(budget, max(sum(len(batch[i]) for i in part) for part in parts)))


def train(
    model: Any, material: Material, training: TrainingConfig, objective: Objective, course: Course, progress: Progress
) -> tuple[dict[str, list[Any]], dict[str, Any], tuple[list[Outcome], list[Outcome]]]:
    """Train an adapter and keep the one with the lowest held-out loss, the untrained one included.

    The loss of a step is the mean over its samples, plus the mean over its texts. Deterministic for a seed on a CPU.

    Args:
        model: the output of `add_adapter`, its random weights already seeded.
        progress: called after every step.

    Returns:
        The columns of `log.parquet`; the measurements: tokens, tokens/s, epochs; and what the untrained adapter and the
        one that is kept do on the held-out samples.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step.
    """
    samples, held_out = material.samples, material.held_out
    per_epoch = math.ceil(len(samples) / training.batch_size)
    steps, tokens, started = per_epoch * course.epochs, 0, time.perf_counter()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=training.learning_rate)
    state = State(training.micro_batch_tokens, math.inf, _copy(model), {name: [] for name in LOG_SCHEMA.names})
    if course.resume:
        load_state(course.resume, state, model, optimiser)
    with packed_attention(model.get_base_model()):
        if held_out and not state.step:
            loss = _evaluate(model, held_out, training, state)
            _append(state.log, step=0, epoch=0, held_out_loss=loss)
            tokens += sum(map(len, held_out))
        while state.step < steps and state.worse < course.patience:
            state.step += 1
            epoch, rate = math.ceil(state.step / per_epoch), learning_rate(state.step, steps, training)
            batch, shares = material.batch(state.step, training.batch_size, course.seed)
            model.train()
            loss, distance, state.budget = _backward(model, batch, shares, training, objective, state.budget)
            if not math.isfinite(loss):
                raise FloatingPointError(f"training: loss is {loss} at step {state.step} of {steps}")
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad()
            tokens += sum(map(len, batch))
            logged = distance if objective.distillation else None
            _append(state.log, step=state.step, epoch=epoch, loss=loss, divergence=logged, learning_rate=rate)
            progress(state.step, steps)
            if not held_out and state.step % math.ceil(steps / 10) == 0:
                _log.info("step %d of %d: loss %.4f", state.step, steps, loss)
            if held_out and state.step % per_epoch == 0:
                held = state.log["held_out_loss"][-1] = _evaluate(model, held_out, training, state)
                tokens += sum(map(len, held_out))
                _log.info("epoch %d of %d: loss %.4f, held out %.4f", epoch, course.epochs, loss, held)
            if course.resume and course.every and state.step % course.every == 0:
                save_state(course.resume, state, model, optimiser)
    if held_out:
        from peft import set_peft_model_state_dict  # late: it brings bitsandbytes, where that is installed

        set_peft_model_state_dict(model, state.best_adapter)
    progress(steps, steps)
    tokens_per_second = round(tokens / (time.perf_counter() - started), 1)
    measured = {"tokens": tokens, "tokens_per_second": tokens_per_second, "epochs": max(state.log["epoch"])}
    return state.log, measured, (state.untrained, state.kept)


def _evaluate(model: Any, held_out: Sequence[Sample], training: TrainingConfig, state: State) -> float:
    """The held-out loss; the state keeps the adapter if it is the first, or better than all before."""
    found = outcomes(model, held_out, training, state.budget)
    loss = training_loss(found)
    if not state.step:
        state.untrained = found
    if not state.step or loss < state.best:
        state.best, state.best_adapter, state.kept, state.worse = loss, _copy(model), found, 0
    else:
        state.worse += 1
    return loss


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
