"""Soft prompts, to compare LoRA with: prompt tuning (arXiv 2104.08691)."""

from __future__ import annotations

from typing import Any

import torch

from tailored_llama.models.attention import Header
from tailored_llama.models.packing import embedded_header


def context_length(model: Any) -> int:
    """How many tokens a model can read: its context, minus the length of its soft prompt."""
    limit = int(model.config.max_position_embeddings)
    return limit - model.active_peft_config.num_virtual_tokens if has_soft_prompt(model) else limit


def has_soft_prompt(model: Any) -> bool:
    adapter = getattr(model, "active_peft_config", None)
    return bool(adapter and adapter.is_prompt_learning)


def learnt_header(model: Any) -> Header:
    """The header that a soft prompt puts before every document; empty if the model has no soft prompt.

    Gradients reach the soft prompt. `model` is inside `packed_attention`.
    """
    if not has_soft_prompt(model):
        return Header()
    with torch.autocast(model.device.type, enabled=False):  # under autocast PEFT would join tensors of different types
        learnt = model.get_prompt(batch_size=1)
    return embedded_header(model, learnt)
