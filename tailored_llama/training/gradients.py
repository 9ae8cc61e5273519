"""The gradients of one step, in passes that fit into memory and keep a CPU's threads busy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tailored_llama.config import TrainingConfig
from tailored_llama.memory import out_of_memory
from tailored_llama.models import busy_threads, halved, passes_at_once, side_by_side, threads_each, using_threads
from tailored_llama.training.losses import Sample, autocast, sample_losses
from tailored_llama.training.processes import gathered, passes, rank_and_count, trained
from tailored_llama.training.state import Training


def add_gradients(now: Training, batch: Sequence[Sample]) -> float:
    """Accumulate a step's gradients in micro-batches; when memory runs out, halve them and start the step again."""
    while True:
        loss = 0.0
        parts = passes(list(map(len, batch)), now.budget)
        try:
            for part in parts:
                own = [batch[i] for i in part] or [min(batch, key=len)]
                loss += _pass(now, own, 1 / len(batch) if part else 0.0)
        except (RuntimeError, MemoryError) as error:
            if max(map(len, parts)) == 1 or not out_of_memory(error):
                raise
        else:
            return sum(gathered({rank_and_count()[0]: loss}).values())
        now.model.zero_grad()  # drop the gradients of the parts that did fit
        largest = max(sum(len(batch[i]) for i in part) for part in parts)
        now.budget = halved(min(now.budget, largest))


def _pass(now: Training, batch: Sequence[Sample], share: float) -> float:
    """Backward pass of a micro-batch, each sample with this share of the loss.

    As a function of its own, it frees the graph of a pass that did not fit.
    """
    if len(parts := _parts(now, batch)) > 1:
        return _pass_in_parts(now, parts, share)
    with using_threads(busy_threads(now.model, sum(map(len, batch)))):
        loss = now.call(_weighted_loss, now.settings, batch, share)
        (loss * rank_and_count()[1]).backward()  # processes that train together take the mean of their gradients
    return float(loss.item())


def _parts(now: Training, batch: Sequence[Sample]) -> list[list[Sample]]:
    """Parts of a micro-batch to compute side by side, of about the same length; one part where that gains nothing.

    It is one, too, with dropout, whose random numbers would depend on the order of threads, and where processes train
    together.
    """
    dropout = [module.p for module in now.model.modules() if isinstance(module, torch.nn.Dropout)]
    alone = rank_and_count()[1] > 1 or any(dropout) or getattr(now.model.config, "attention_dropout", None)
    count = 1 if alone else min(len(batch), passes_at_once(now.model, sum(map(len, batch))))
    parts: list[list[Sample]] = [[] for _ in range(count)]
    for sample in sorted(batch, key=len, reverse=True):
        min(parts, key=lambda part: sum(map(len, part))).append(sample)
    return parts


def _pass_in_parts(now: Training, parts: Sequence[Sequence[Sample]], share: float) -> float:
    """Backward passes side by side. Their gradients are added up in the order of the parts, not of the threads."""
    parameters = list(trained(now.model).values())

    def run(part: Sequence[Sample]) -> tuple[float, Sequence[Tensor | None]]:
        with using_threads(busy_threads(now.model, sum(map(len, part)))):
            loss = now.call(_weighted_loss, now.settings, part, share)
            return float(loss.item()), torch.autograd.grad(loss, parameters, allow_unused=True)

    results = side_by_side(run, parts, threads_each(len(parts)))
    for parameter, *gradients in zip(parameters, *(own for _, own in results), strict=True):
        for gradient in gradients:
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return sum(loss for loss, _ in results)


def _weighted_loss(model: Any, settings: TrainingConfig, batch: Sequence[Sample], share: float) -> Tensor:
    with autocast(model, settings):
        return torch.stack(sample_losses(model, batch)).sum() * share
