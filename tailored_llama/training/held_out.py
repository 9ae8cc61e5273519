"""What a model does on the held-out slice of the train split, with or without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tailored_llama.config import TrainingConfig
from tailored_llama.models import packed_attention, within_memory
from tailored_llama.training.losses import Sample, autocast, choice_losses, choice_scores
from tailored_llama.training.records import Outcome


def outcomes(model: Any, samples: Sequence[Sample], training: TrainingConfig, budget: int) -> list[Outcome]:
    """What a model, with or without an adapter, does on held-out examples, in their order.

    Args:
        model: a causal LM, or a PEFT model.
        samples: with all choices encoded; one choice alone is a written answer.
        training: the precision.
        budget: tokens per pass.
    """
    model.eval()
    found: dict[int, Outcome] = {}

    def run(part: list[int]) -> list[Outcome]:
        batch = [samples[i] for i in part]
        with autocast(model, training):
            _, _, choices = choice_losses(model, batch)
        return [_outcome(own, sample) for own, sample in zip(choices, batch, strict=True)]

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.inference_mode(), packed_attention(base):
        for part, results in within_memory([len(sample) for sample in samples], budget, run):
            found |= dict(zip(part, results, strict=True))
    return [found[i] for i in range(len(samples))]


def _outcome(choices: Sequence[Tensor], sample: Sample) -> Outcome:
    answer_loss = float(choices[sample.answer].mean())
    if len(choices) == 1:
        return Outcome(answer_loss, None, answer_loss)
    scores = choice_scores(choices, sample)
    loss = cross_entropy(scores, torch.tensor(sample.answer, device=scores.device))
    return Outcome(float(loss), int(scores.argmax()) == sample.answer, answer_loss)


def training_loss(held_out: Sequence[Outcome]) -> float:
    """Mean over held-out examples of the loss that training lowers, without divergence (`sample_losses`)."""
    return sum(outcome.answer_loss for outcome in held_out) / len(held_out)
