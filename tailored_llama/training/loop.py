"""Training: micro-batches that fit into memory, in one process or several, and the loop.

The loop is our own, with the optimisers, schedules and trackers of transformers and accelerate. transformers' Trainer
takes batches of one padded tensor. Here a step is packed rows of examples, or of texts with a teacher's outputs beside
them, cut to a number of tokens that is halved when memory runs out.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import get_scheduler

from tailored_llama.config import TrainingConfig, Work
from tailored_llama.memory import out_of_memory
from tailored_llama.models import halved, packed_attention
from tailored_llama.store import write_table
from tailored_llama.training.losses import Sample, autocast, outcomes, sample_losses, training_loss
from tailored_llama.training.records import LOG, LOG_SCHEMA, Outcome, step_log
from tailored_llama.training.sharding import gathered, passes, put, rank_and_count, share_out, trained, whole
from tailored_llama.training.state import State, load_state, save_state

_log = logging.getLogger(__name__)

# Multiplications of one projection (tokens × hidden²) that keep a thread of a CPU busy. With fewer, threads wait for
# each other at every small operation for longer than they compute. On one thread instead of two, SmolLM2's steps of 180
# tokens take 0.8 of the time, those of 500 as long:
# tailored-llama run data/quickstart.toml --only "tune arc_easy @ 0.20"
_PER_THREAD = 2**27
_TIMED_STEPS = 10  # after which the time that is left is told


@dataclass(frozen=True)
class Material:
    """What is trained on: examples, or texts with a teacher.

    `held_out` samples are for early stopping: examples with all their choices, or texts; empty: no stopping.
    """

    samples: Sequence[Sample]
    held_out: Sequence[Sample] = ()

    def batch(self, step: int, size: int, seed: int) -> list[Sample]:
        """The samples of a step, counted from 1; the order depends on seed and epoch alone, for a resumed training."""
        epoch, position = divmod(step - 1, math.ceil(len(self.samples) / size))
        order = np.random.default_rng((seed, epoch)).permutation(len(self.samples))
        return [self.samples[int(i)] for i in order[position * size : (position + 1) * size]]


@dataclass(frozen=True)
class Course:
    """The course of a training.

    It has at most `epochs` passes over the samples, in an order by `seed`, and stops after `patience` checks without a
    lower held-out loss; there are `checks` of it in an epoch. `keeps_best`: what had the lowest is kept, not the last.
    """

    seed: int
    epochs: int = 1
    patience: int = 1
    checks: int = 1
    keeps_best: bool = True


@dataclass(frozen=True)
class _Training:
    """A training under way; `call` calls a function with the model (`share_out`)."""

    model: Any
    call: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    settings: TrainingConfig
    state: State


def train(
    model: Any, material: Material, training: TrainingConfig, course: Course, work: Work
) -> tuple[dict[str, Any], tuple[list[Outcome], list[Outcome]]]:
    """Train what requires gradients, and keep what has the lowest held-out loss, the untrained included, or the last.

    Writes `log.parquet`. The loss of a step is the mean over its samples. Deterministic for a seed on a CPU.

    Args:
        model: the output of `add_adapter`, its random weights already seeded; or a causal LM, to train all its weights.
            It is on the CPU if several processes train it, which hold parts of it afterwards (`sharding.py`).
        work: its progress is called after every step, and its folder `resume` gets the state of the training: one that
            is there already is resumed.

    Returns:
        The measurements: tokens, tokens/s, epochs; and what the untrained model and the one that is kept do on the
        held-out samples.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step.
    """
    held_out, per_epoch = material.held_out, math.ceil(len(material.samples) / training.batch_size)
    steps, tokens, started = per_epoch * course.epochs, 0, time.perf_counter()
    now = _begin(model, training, bool(held_out) and course.keeps_best, work)
    check_every, first = math.ceil(per_epoch / course.checks), now.state.step
    state, base = now.state, model.get_base_model() if hasattr(model, "get_base_model") else model
    with packed_attention(base), step_log(work, state.step + 1) as show:
        if held_out and not state.step:
            show(_append(state.log, step=0, epoch=0, held_out_loss=_evaluate(now, held_out)), 0)
            tokens += sum(map(len, held_out))
        while state.step < steps and state.worse < course.patience:
            state.step += 1
            batch = material.batch(state.step, training.batch_size, course.seed)
            # Dropout is seeded at every step, so that a resumed training finds it again.
            torch.manual_seed(
                int(np.random.SeedSequence((course.seed, state.step, rank_and_count()[0])).generate_state(1)[0])
            )
            row = {"step": state.step, "epoch": math.ceil(state.step / per_epoch)} | _step(now, batch, steps)
            tokens += sum(map(len, batch))
            work.progress(state.step, steps)
            _tell_time(started, state.step - first, steps - state.step)
            if held_out and (state.step % per_epoch % check_every == 0):
                row["held_out_loss"] = _evaluate(now, held_out)
                tokens += sum(map(len, held_out))
                figures = row["epoch"], course.epochs, state.step, steps, row["loss"], row["held_out_loss"]
                _log.info("epoch %d of %d, step %d of %d: loss %.4f, held out %.4f", *figures)
            elif not held_out and state.step % math.ceil(steps / 10) == 0:
                _log.info("step %d of %d: loss %.4f", state.step, steps, row["loss"])
            show(_append(state.log, **row), state.step)
            if work.resume and (every := work.execution.keep_state_every) and state.step % every == 0:
                save_state(work.resume, state, model, now.optimizer)
    if state.best_weights:
        put(model, state.best_weights)
    work.progress(steps, steps)
    tokens_per_second = round(tokens / (time.perf_counter() - started), 1)
    measured = {"tokens": tokens, "tokens_per_second": tokens_per_second, "epochs": max(state.log["epoch"])}
    write_table(work.out / LOG, state.log, LOG_SCHEMA)
    return measured, (state.untrained, state.kept)


def _tell_time(started: float, done: int, left: int) -> None:
    """Say after the first ten steps how long the others will take, if that is minutes."""
    minutes = (time.perf_counter() - started) / max(1, done) * left / 60
    if done == _TIMED_STEPS and minutes > 1:
        told = (minutes / 60, "hours") if minutes > 90 else (minutes, "minutes")
        _log.info("%d steps are left: about %.1f %s", left, *told)


def _begin(model: Any, settings: TrainingConfig, selects: bool, work: Work) -> _Training:
    """Share the model out, and find the state of an earlier training; `selects`: the best weights are kept."""
    call = share_out(model, settings.precision)
    optimizer = _make_optimizer(trained(model).values(), settings)
    log: dict[str, list[Any]] = {name: [] for name in LOG_SCHEMA.names}
    state = State(settings.micro_batch_tokens >> work.halvings, math.inf, _copy(model) if selects else {}, log)
    if work.resume:
        load_state(work.resume, state, model, optimizer)
    return _Training(model, call, optimizer, settings, state)


def _make_optimizer(parameters: Iterable[Tensor], training: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of this name in transformers, with the options that it gives it and its own weight decay."""
    from transformers import Trainer, TrainingArguments  # late: seconds, which other stages need not wait

    settings = TrainingArguments(
        output_dir="unused", optim=training.optimizer, learning_rate=training.learning_rate, use_cpu=True
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(settings)
    optimizer: torch.optim.Optimizer = kind(parameters, **options)
    return optimizer


def learning_rate(step: int, steps: int, training: TrainingConfig) -> float:
    """The rate of a step, counted from 1, by the schedule of this name in transformers.

    The schedule counts from 0, where a warm-up is at 0: a step that learns nothing is left out. So the first two steps
    at the peak are the last one of the warm-up and the first one after it.
    """
    warmup = round(training.warmup * steps)
    unused = torch.optim.SGD([torch.zeros(1)], training.learning_rate)
    schedule = get_scheduler(training.schedule, unused, warmup, steps)
    factor: float = schedule.lr_lambdas[0](step if step <= warmup else step - 1)
    return training.learning_rate * factor


def _step(now: _Training, batch: Sequence[Sample], steps: int) -> dict[str, Any]:
    """One step of the optimiser, of `steps`; returns its figures."""
    now.model.train()
    loss = _backward(now, batch)
    if not math.isfinite(loss):
        raise FloatingPointError(f"training: loss is {loss} at step {now.state.step} of {steps}")
    rate = learning_rate(now.state.step, steps, now.settings)
    for group in now.optimizer.param_groups:
        group["lr"] = rate
    now.optimizer.step()
    now.optimizer.zero_grad()
    return {"loss": loss, "learning_rate": rate}


def _backward(now: _Training, batch: Sequence[Sample]) -> float:
    """Accumulate a step's gradients in micro-batches; when memory runs out, halve them and start the step again."""
    while True:
        loss = 0.0
        parts = passes(list(map(len, batch)), now.state.budget)
        try:
            for part in parts:
                own = [batch[i] for i in part] or [min(batch, key=len)]
                loss += _add_gradients(now, own, 1 / len(batch) if part else 0.0)
        except (RuntimeError, MemoryError) as error:
            if max(map(len, parts)) == 1 or not out_of_memory(error):
                raise
        else:
            return sum(gathered({rank_and_count()[0]: loss}).values())
        now.model.zero_grad()  # drop the gradients of the parts that did fit
        largest = max(sum(len(batch[i]) for i in part) for part in parts)
        now.state.budget = halved(min(now.state.budget, largest))


def _add_gradients(now: _Training, batch: Sequence[Sample], share: float) -> float:
    """Backward pass of a micro-batch, each sample with this share of the loss.

    It is a function of its own so that the graph of a pass that did not fit is freed.
    """
    with _busy_threads(now.model, sum(map(len, batch))):
        loss = now.call(_weighted_loss, now.settings, batch, share)
        (loss * rank_and_count()[1]).backward()  # processes that train together take the mean of their gradients
    return float(loss.item())


def _weighted_loss(model: Any, settings: TrainingConfig, batch: Sequence[Sample], share: float) -> Tensor:
    with autocast(model, settings):
        return torch.stack(sample_losses(model, batch)).sum() * share


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


def _evaluate(now: _Training, held_out: Sequence[Sample]) -> float:
    """The held-out loss; the state keeps the weights if they are the first, or better than all before."""
    state, found = now.state, _outcomes(now, held_out)
    loss = training_loss(found)
    if not state.step:
        state.untrained = found
    if not state.step or loss < state.best:
        best = _copy(now.model) if state.best_weights else {}
        state.best, state.best_weights, state.kept, state.worse = loss, best, found, 0
    else:
        state.worse += 1
    return loss


def _outcomes(now: _Training, held_out: Sequence[Sample]) -> list[Outcome]:
    """What the model does on held-out samples; several processes share them out."""
    if rank_and_count()[1] == 1:
        return list(now.call(outcomes, held_out, now.settings, now.state.budget))
    own: dict[int, Outcome] = {}
    for part in passes(list(map(len, held_out)), now.state.budget):
        batch = [held_out[i] for i in part] or [min(held_out, key=len)]
        found = now.call(outcomes, batch, now.settings, sys.maxsize)
        own |= zip(part, found, strict=False)  # none of an empty part
    by_number = gathered(own)
    return [by_number[i] for i in range(len(held_out))]


def _copy(model: Any) -> dict[str, Tensor]:
    return {name: whole(parameter).clone() for name, parameter in trained(model).items()}


def _append(log: dict[str, list[Any]], **row: Any) -> dict[str, Any]:
    for name, column in log.items():
        column.append(row.get(name))
    return row
