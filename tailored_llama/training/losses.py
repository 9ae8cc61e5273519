"""Samples to train on, their losses and gradients, and what a model does on held-out examples.

The gradients of a step are computed in passes that fit into memory and keep a CPU's threads busy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from tailored_llama import models
from tailored_llama.config import AdapterConfig
from tailored_llama.memory import out_of_memory
from tailored_llama.training.records import Outcome
from tailored_llama.training.state import Training


@dataclass(frozen=True)
class Sample:
    """One sample: an example's right choice to train on, or all its choices to compare."""

    encoded: models.Encoded
    answer: int
    scales: tuple[float, ...]  # by choice: makes their log-likelihoods comparable

    def __len__(self) -> int:
        return len(self.encoded.document)


def in_bfloat16(model: Any, training: AdapterConfig) -> bool:
    """Return whether matrix products are in bfloat16, as in any case where the model is."""
    return training.precision == "bfloat16" or model.dtype == torch.bfloat16


def autocast(model: Any, training: AdapterConfig) -> torch.autocast:
    """Matrix products in the configured precision, those of adapters too."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=in_bfloat16(model, training))


def sample_losses(model: Any, batch: Sequence[Sample]) -> list[Tensor]:
    """Loss of every sample of a packed row: the mean over its right choice's tokens."""
    return [nll[sample.answer].mean() for sample, nll in zip(batch, choice_losses(model, batch), strict=True)]


def choice_losses(model: Any, batch: Sequence[Sample]) -> list[list[Tensor]]:
    """The negative log-likelihoods of every choice's tokens, of every sample of a packed row, in nats.

    Logits exist for a bounded number of positions at a time. If there are more, they are computed again for gradients.
    """
    row = models.row_of([sample.encoded for sample in batch])
    states = models.packed_states(model, row.documents, torch.tensor(row.positions))
    sizes = [len(tokens) for sample in batch for tokens in sample.encoded.targets]
    targets = torch.tensor(row.targets, dtype=torch.int64, device=states.device)
    chunks = list(zip(states.split(models.HEAD_POSITIONS), targets.split(models.HEAD_POSITIONS), strict=True))
    if len(chunks) == 1:
        losses = _nll(model, *chunks[0])
    else:
        again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn there
        losses = torch.cat([checkpoint(_nll, model, *chunk, **again) for chunk in chunks])
    parts = iter(losses.split(sizes))
    return [[next(parts) for _ in sample.scales] for sample in batch]


def _nll(model: Any, states: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods [positions] of target tokens, from the states before them."""
    logits = models.head_logits(model, states)
    return cross_entropy(logits.float(), targets.to(logits.device), reduction="none")


def add_gradients(now: Training, batch: Sequence[Sample]) -> float:
    """Accumulate a step's gradients in micro-batches; when memory runs out, halve them and start the step again."""
    while True:
        loss = 0.0
        parts = models.batches(list(map(len, batch)), now.budget)
        try:
            for part in parts:
                loss += _pass(now, [batch[i] for i in part], 1 / len(batch))
        except (RuntimeError, MemoryError) as error:
            if max(map(len, parts)) == 1 or not out_of_memory(error):
                raise
        else:
            return loss
        now.model.zero_grad()  # drop the gradients of the parts that did fit
        largest = max(sum(len(batch[i]) for i in part) for part in parts)
        now.budget = models.halved(min(now.budget, largest))


def _pass(now: Training, batch: Sequence[Sample], share: float) -> float:
    """Backward pass of a micro-batch, each sample with this share of the loss; a graph that did not fit is freed."""
    with models.using_threads(models.busy_threads(now.model, sum(map(len, batch)))):
        with autocast(now.model, now.settings):
            loss = torch.stack(sample_losses(now.model, batch)).sum() * share
        loss.backward()
    return float(loss.item())


def outcomes(model: Any, samples: Sequence[Sample], training: AdapterConfig, budget: int) -> list[Outcome]:
    """Measure what a model does on held-out samples, with all choices encoded, in their order, `budget` tokens a pass.

    One choice alone is a written answer.
    """
    model.eval()
    by_number: dict[int, Outcome] = {}

    def run(part: list[int]) -> list[Outcome]:
        batch = [samples[i] for i in part]
        with autocast(model, training):
            return [_outcome(nll, sample) for nll, sample in zip(choice_losses(model, batch), batch, strict=True)]

    with torch.no_grad(), models.packed_attention(model):
        lengths = [models.tokens_read(model, sample.encoded.document) for sample in samples]
        at_once = models.passes_at_once(model, budget)
        for part, results in models.within_memory(lengths, budget, run, at_once=at_once):
            by_number |= dict(zip(part, results, strict=True))
    return [by_number[i] for i in range(len(samples))]


def _outcome(choices: Sequence[Tensor], sample: Sample) -> Outcome:
    answer_loss = float(choices[sample.answer].mean())
    if len(choices) == 1:
        return Outcome(answer_loss, None, answer_loss)
    scores = torch.stack([-c.sum() * scale for c, scale in zip(choices, sample.scales, strict=True)])
    loss = cross_entropy(scores, torch.tensor(sample.answer, device=scores.device))
    return Outcome(float(loss), int(scores.argmax()) == sample.answer, answer_loss)


def training_loss(held_out: Sequence[Outcome]) -> float:
    """Mean over held-out samples of the loss that training lowers."""
    return sum(outcome.answer_loss for outcome in held_out) / len(held_out)
