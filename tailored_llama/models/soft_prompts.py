"""Soft prompts, to compare LoRA with: prompt tuning (arXiv 2104.08691) and prefix tuning (arXiv 2101.00190)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.sdpa_attention import repeat_kv

from tailored_llama.errors import InputError
from tailored_llama.models.attention import Header
from tailored_llama.models.modeling_tailored_llama import NoSelfAttn
from tailored_llama.models.packing import embedded_header

if TYPE_CHECKING:
    from peft import PeftConfig


def soft_prompt_config(base: Any, variant: str, tokens: int) -> PeftConfig:
    """PEFT's configuration of a new soft prompt.

    Args:
        base: the causal LM it is for.
        variant: `prompt` (embeddings before the text) or `prefix` (keys and values of every layer).
        tokens: its length.

    Raises:
        InputError: a prefix for a model whose layers have different numbers of KV heads, which PEFT's format cannot
            hold.
    """
    from peft import PrefixTuningConfig, PromptTuningConfig  # late: most stages need none of it

    if variant == "prompt":
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    attention = [layer.self_attn for layer in base.get_decoder().layers]
    shapes = {
        (_kv_heads(base, layer, module), getattr(module, "head_dim", 0)) for layer, module in enumerate(attention)
    }
    if len(shapes) > 1:
        counts = ", ".join(str(heads) for heads, _ in sorted(shapes))
        raise InputError(
            f"tuning.variant: got 'prefix' for a model whose layers have {counts} KV heads; allowed: prompt, lora, "
            "rslora, dora, or a model pruned with pruning.kinds = ['mlp']"
        )
    ((heads, size),) = shapes
    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        num_layers=len(attention),
        num_attention_heads=heads,
        token_dim=heads * size,
    )


def _kv_heads(base: Any, layer: int, attention: Any) -> int:
    if isinstance(attention, NoSelfAttn):
        return 0
    if hasattr(attention, "k_proj"):
        return int(attention.k_proj.out_features // attention.head_dim)
    return int(base.config.num_key_value_heads)  # fused projections (Phi-3): all layers are alike


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
    if model.active_peft_config.peft_type == "PROMPT_TUNING":
        return embedded_header(model, learnt)
    header = Header(model.active_peft_config.num_virtual_tokens)
    for index, layer in enumerate(model.get_decoder().layers):
        states = learnt.layers[index]
        groups = layer.self_attn.num_key_value_groups
        header.keys[index], header.values[index] = repeat_kv(states.keys, groups), repeat_kv(states.values, groups)
    return header
