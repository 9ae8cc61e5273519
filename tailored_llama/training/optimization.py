"""Optimisers and learning-rate schedules, by their names in transformers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import get_scheduler

from tailored_llama.config import TrainingConfig


def make_optimizer(parameters: Iterable[Tensor], training: TrainingConfig) -> Optimizer:
    """The optimiser of a training, with the options that transformers gives it and its own weight decay."""
    from transformers import Trainer, TrainingArguments  # late: seconds, which other stages need not wait

    settings = TrainingArguments(
        output_dir="unused", optim=training.optimizer, learning_rate=training.learning_rate, use_cpu=True
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(settings)
    optimizer: Optimizer = kind(parameters, **options)
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
