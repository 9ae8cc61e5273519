"""Training: micro-batches that fit into memory, in one process or several, and the loop.

The loop is our own, with the optimisers, schedules and trackers of transformers and accelerate. transformers' Trainer
takes batches of one padded tensor. Here a step is packed rows of examples and texts, with a teacher's outputs beside
them, cut to a number of tokens that is halved when memory runs out.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailored_llama.config import TrainingConfig, Work
from tailored_llama.memory import out_of_memory
from tailored_llama.models import halved, packed_attention
from tailored_llama.training.logs import step_log
from tailored_llama.training.losses import Objective, Sample, autocast, outcomes, sample_losses, training_loss
from tailored_llama.training.optimization import learning_rate, make_optimizer
from tailored_llama.training.records import LOG_SCHEMA, Outcome
from tailored_llama.training.sharding import gathered, passes, place, put, share_out, total, trained, whole
from tailored_llama.training.state import State, load_state, save_state

_log = logging.getLogger(__name__)

# Multiplications of one projection (tokens × hidden²) that keep a thread busy. On a CPU with fewer, threads wait for
# each other at every small operation for longer than they compute.
_PER_THREAD = 2**26


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
    lower held-out loss.
    """

    seed: int
    epochs: int = 1
    patience: int = 1


@dataclass(frozen=True)
class _Step:
    """The samples of a step and the weights of their losses; `call` calls a function with the model (`share_out`)."""

    call: Callable[..., Any]
    samples: Sequence[Sample]
    shares: Sequence[float]
    training: TrainingConfig
    objective: Objective


def _add_gradients(model: Any, step: _Step, part: Sequence[int]) -> tuple[float, float]:
    """Backward pass of a part, in its own function so that the graph of a pass that did not fit is freed."""
    batch = [step.samples[i] for i in part] or [min(step.samples, key=len)]
    shares = [step.shares[i] for i in part] or [0.0]
    with _busy_threads(model, sum(map(len, batch))):
        loss, pairs = step.call(_loss, step, batch, shares)
        (loss * place()[1]).backward()  # processes that train together take the mean of their gradients
    return loss.item(), sum(share * distance.item() for share, (_, distance) in zip(shares, pairs, strict=True))


def _loss(model: Any, step: _Step, batch: Sequence[Sample], shares: Sequence[float]) -> tuple[Tensor, Any]:
    """The weighted sum of the samples' losses, and the loss and the divergence of each."""
    with autocast(model, step.training):
        pairs = list(sample_losses(model, batch, step.objective))
        return torch.stack([share * loss for share, (loss, _) in zip(shares, pairs, strict=True)]).sum(), pairs


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


def _backward(model: Any, step: _Step, budget: int) -> tuple[float, float, int]:
    """Accumulate the gradients of a step in micro-batches; when memory runs out, halve them and start the step again.

    Args:
        budget: tokens per micro-batch.

    Returns:
        The loss, the divergence in it, and the tokens per micro-batch that did fit.
    """
    while True:
        loss = distance = 0.0
        parts = passes(list(map(len, step.samples)), budget)
        try:
            for part in parts:
                sums = _add_gradients(model, step, part)
                loss, distance = loss + sums[0], distance + sums[1]
        except (RuntimeError, MemoryError) as error:
            if max(map(len, parts)) == 1 or not out_of_memory(error):
                raise
        else:
            loss, distance = total(model, loss, distance)
            return loss, distance, budget
        model.zero_grad()  # drop the gradients of the parts that did fit
        budget = halved(min(budget, max(sum(len(step.samples[i]) for i in part) for part in parts)))


def train(
    model: Any, material: Material, training: TrainingConfig, objective: Objective, course: Course, work: Work
) -> tuple[dict[str, list[Any]], dict[str, Any], tuple[list[Outcome], list[Outcome]]]:
    """Train what requires gradients, and keep what has the lowest held-out loss, the untrained included.

    The loss of a step is the mean over its samples, plus the mean over its texts. Deterministic for a seed on a CPU.

    Args:
        model: the output of `add_adapter`, its random weights already seeded; or a causal LM, to train all its weights.
            It is on the CPU if several processes train it, which hold parts of it afterwards (`sharding.py`).
        work: its progress is called after every step, and its folder `resume` gets the state of the training: one that
            is there already is resumed.

    Returns:
        The columns of `log.parquet`; the measurements: tokens, tokens/s, epochs; and what the untrained model and the
        one that is kept do on the held-out samples.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step.
    """
    samples, held_out, execution = material.samples, material.held_out, work.execution
    per_epoch = math.ceil(len(samples) / training.batch_size)
    steps, tokens, started = per_epoch * course.epochs, 0, time.perf_counter()
    call = share_out(model, training.precision)
    optimizer = make_optimizer(trained(model).values(), training)
    log: dict[str, list[Any]] = {name: [] for name in LOG_SCHEMA.names}
    state = State(training.micro_batch_tokens >> work.halvings, math.inf, _copy(model) if held_out else {}, log)
    if work.resume:
        load_state(work.resume, state, model, optimizer)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with packed_attention(base), step_log(work, state.step + 1) as show:
        if held_out and not state.step:
            loss = _evaluate(model, call, held_out, training, state)
            show(_append(state.log, step=0, epoch=0, held_out_loss=loss), 0)
            tokens += sum(map(len, held_out))
        while state.step < steps and state.worse < course.patience:
            state.step += 1
            epoch, rate = math.ceil(state.step / per_epoch), learning_rate(state.step, steps, training)
            batch, shares = material.batch(state.step, training.batch_size, course.seed)
            torch.manual_seed(_seed(course.seed, state.step, place()[0]))  # of dropout, so that a resumed step finds it
            model.train()
            loss, distance, state.budget = _backward(
                model, _Step(call, batch, shares, training, objective), state.budget
            )
            if not math.isfinite(loss):
                raise FloatingPointError(f"training: loss is {loss} at step {state.step} of {steps}")
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(map(len, batch))
            logged = distance if objective.distillation else None
            row = _append(state.log, step=state.step, epoch=epoch, loss=loss, divergence=logged, learning_rate=rate)
            work.progress(state.step, steps)
            if not held_out and state.step % math.ceil(steps / 10) == 0:
                _log.info("step %d of %d: loss %.4f", state.step, steps, loss)
            if held_out and state.step % per_epoch == 0:
                held = row["held_out_loss"] = _evaluate(model, call, held_out, training, state)
                state.log["held_out_loss"][-1] = held
                tokens += sum(map(len, held_out))
                _log.info("epoch %d of %d: loss %.4f, held out %.4f", epoch, course.epochs, loss, held)
            show(row, state.step)
            if work.resume and execution.keep_state_every and state.step % execution.keep_state_every == 0:
                save_state(work.resume, state, model, optimizer)
    if held_out:
        put(model, state.best_weights)
    work.progress(steps, steps)
    tokens_per_second = round(tokens / (time.perf_counter() - started), 1)
    measured = {"tokens": tokens, "tokens_per_second": tokens_per_second, "epochs": max(state.log["epoch"])}
    return state.log, measured, (state.untrained, state.kept)


def _evaluate(
    model: Any, call: Callable[..., Any], held_out: Sequence[Sample], training: TrainingConfig, state: State
) -> float:
    """The held-out loss; the state keeps the weights if they are the first, or better than all before."""
    found = _outcomes(call, held_out, training, state.budget)
    loss = training_loss(found)
    if not state.step:
        state.untrained = found
    if not state.step or loss < state.best:
        state.best, state.best_weights, state.kept, state.worse = loss, _copy(model), found, 0
    else:
        state.worse += 1
    return loss


def _outcomes(
    call: Callable[..., Any], held_out: Sequence[Sample], training: TrainingConfig, budget: int
) -> list[Outcome]:
    """What the model does on held-out samples; several processes share them out."""
    if place()[1] == 1:
        return list(call(outcomes, held_out, training, budget))
    own: dict[int, Outcome] = {}
    for part in passes(list(map(len, held_out)), budget):
        batch = [held_out[i] for i in part] or [min(held_out, key=len)]
        own |= zip(part, call(outcomes, batch, training, sys.maxsize), strict=False)  # none of an empty part
    found = gathered(own)
    return [found[i] for i in range(len(held_out))]


def _copy(model: Any) -> dict[str, Tensor]:
    return {name: whole(parameter).clone() for name, parameter in trained(model).items()}


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _append(log: dict[str, list[Any]], **row: Any) -> dict[str, Any]:
    for name, column in log.items():
        column.append(row.get(name))
    return row
