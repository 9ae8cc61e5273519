"""The training loop.

Schedules are those of transformers. Its Trainer takes batches of one padded tensor. Here a step is packed rows, cut to
a number of tokens that is halved when memory runs out.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import get_scheduler

from tailored_llama.config import AdapterConfig, Work
from tailored_llama.models import packed_attention, token_budget
from tailored_llama.store import write_table
from tailored_llama.training.losses import Sample, add_gradients, in_bfloat16, outcomes, training_loss
from tailored_llama.training.records import LOG, LOG_SCHEMA, Outcome
from tailored_llama.training.state import Training, load_state, put, save_state, trained

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Course:
    """The samples of a training, and its length.

    `samples` are examples, in an order by `seed`. `held_out` are examples with all their choices. A training stops
    after `patience` epochs without a lower loss on them.
    """

    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    seed: int
    epochs: int
    patience: int

    def batch(self, step: int, size: int) -> list[Sample]:
        """The samples of a step, counted from 1; the order depends on seed and epoch alone, for a resumed training."""
        epoch, position = divmod(step - 1, math.ceil(len(self.samples) / size))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.samples))
        return [self.samples[int(i)] for i in order[position * size : (position + 1) * size]]


def train(
    model: Any, course: Course, training: AdapterConfig, work: Work
) -> tuple[dict[str, Any], tuple[list[Outcome], list[Outcome]]]:
    """Train an adapter, and keep the one with the lowest held-out loss, the untrained included, or else the last.

    Writes `log.parquet`, and the state of the training to `work.resume`; one that is there already is resumed. The loss
    of a step is the mean over its samples. Deterministic for a seed on a CPU.

    The model is the output of `add_adapter`, its random weights already seeded.

    Returns:
        The measurements: tokens, tokens/s, epochs; and what the untrained model and the one with the lowest loss do on
        the held-out samples.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step.
    """
    from peft.helpers import disable_input_dtype_casting  # late: most stages need none of it

    held_out, per_epoch = course.held_out, math.ceil(len(course.samples) / training.batch_size)
    steps, tokens, started = per_epoch * course.epochs, 0, time.perf_counter()
    now = _start_or_resume(model, training, bool(held_out), work)
    if work.execution.recompute_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # a new adapter says that it trains, while the dropout that its base may have is off
    # Autocast rounds what an adapter reads. PEFT would cast it to float32 before.
    uncast = disable_input_dtype_casting(model, in_bfloat16(model, training))
    with packed_attention(model), uncast:
        if held_out and not now.step:
            _append(now.log, step=0, epoch=0, held_out_loss=_evaluate(now, held_out))
            tokens += sum(map(len, held_out))
        while now.step < steps and now.worse < course.patience:
            now.step += 1
            batch, epoch = course.batch(now.step, training.batch_size), math.ceil(now.step / per_epoch)
            # Dropout is seeded at every step, so that a resumed training finds it again. The 0 keeps
            # the draws of earlier adapters.
            torch.manual_seed(int(np.random.SeedSequence((course.seed, now.step, 0)).generate_state(1)[0]))
            row = {"step": now.step, "epoch": epoch} | _step(now, batch, steps)
            tokens += sum(map(len, batch))
            work.progress(now.step, steps)
            if held_out and now.step % per_epoch == 0:
                row["held_out_loss"] = _evaluate(now, held_out)
                tokens += sum(map(len, held_out))
                figures = epoch, course.epochs, now.step, steps, row["loss"], row["held_out_loss"]
                _log.info("epoch %d of %d, step %d of %d: loss %.4f, held out %.4f", *figures)
            elif not held_out and now.step % math.ceil(steps / 10) == 0:
                _log.info("step %d of %d: loss %.4f", now.step, steps, row["loss"])
            _append(now.log, **row)
            if work.resume and (every := work.execution.keep_state_every) and now.step % every == 0:
                save_state(work.resume, now)
    if now.best_weights:
        put(model, now.best_weights)
    work.progress(steps, steps)
    tokens_per_second = round(tokens / (time.perf_counter() - started), 1)
    measured = {"tokens": tokens, "tokens_per_second": tokens_per_second, "epochs": max(now.log["epoch"])}
    write_table(work.out / LOG, now.log, LOG_SCHEMA)
    return measured, (now.untrained, now.kept)


def _start_or_resume(model: Any, settings: AdapterConfig, keeps_best: bool, work: Work) -> Training:
    """A training from its start, or from the state of an earlier one."""
    optimizer = torch.optim.AdamW(trained(model).values(), settings.learning_rate, fused=True)
    best, log = _copy(model) if keeps_best else {}, {name: list[Any]() for name in LOG_SCHEMA.names}
    now = Training(model, optimizer, settings, settings.micro_batch_tokens, best, log)
    if work.resume:
        load_state(work.resume, now)
    return now


def learning_rate(step: int, steps: int, training: AdapterConfig) -> float:
    """The rate of a step, counted from 1, by the schedule of this name in transformers.

    A warm-up begins there at 0, a step that learns nothing and is left out. So the peak lasts two steps: the last one
    of the warm-up and the first one after it.
    """
    warmup = round(training.warmup * steps)
    unused = torch.optim.SGD([torch.zeros(1)], training.learning_rate)
    schedule = get_scheduler(training.schedule, unused, warmup, steps)
    factor: float = schedule.lr_lambdas[0](step if step <= warmup else step - 1)
    return training.learning_rate * factor


def _step(now: Training, batch: Sequence[Sample], steps: int) -> dict[str, Any]:
    """One step of the optimiser, of `steps`; returns its figures."""
    if not now.model.training:  # train() visits every module
        now.model.train()
    loss = add_gradients(now, batch)
    if not math.isfinite(loss):
        raise FloatingPointError(f"training: loss is {loss} at step {now.step} of {steps}")
    rate = learning_rate(now.step, steps, now.settings)
    for group in now.optimizer.param_groups:
        group["lr"] = rate
    now.optimizer.step()
    now.optimizer.zero_grad()
    return {"loss": loss, "learning_rate": rate}


def _evaluate(now: Training, held_out: Sequence[Sample]) -> float:
    """The held-out loss; the weights are kept if they are the first, or better than all before."""
    results = outcomes(now.model, held_out, now.settings, min(now.budget, token_budget(None, now.model)))
    loss = training_loss(results)
    if not now.step:
        now.untrained = results
    if not now.step or loss < now.best:
        best = _copy(now.model) if now.best_weights else {}
        now.best, now.best_weights, now.kept, now.worse = loss, best, results, 0
    else:
        now.worse += 1
    return loss


def _copy(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained(model).items()}


def _append(log: dict[str, list[Any]], **row: Any) -> None:
    for name, column in log.items():
        column.append(row.get(name))
