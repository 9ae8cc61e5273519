"""A LLaMA whose decoder layers may have different widths (`config.per_layer_config`).

This file is copied into per-layer checkpoints, so that they load with `trust_remote_code=True` where tailored_llama is
not installed. It depends on transformers only. `import tailored_llama` registers the same classes.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


@strict  # without it save_pretrained would still run LlamaConfig's own validator
class TailoredLlamaConfig(LlamaConfig):
    """A LlamaConfig whose global widths are the dense model's; each layer's own are in `per_layer_config`."""

    model_type = "tailored_llama"

    def validate_architecture(self) -> None:
        """Check each layer's heads (the stock check reads one head count and wants it to divide the hidden size)."""
        for index, layer in enumerate(self.per_layer_config):
            if layer.num_attention_heads % layer.num_key_value_heads:
                raise ValueError(
                    f"layer {index}: {layer.num_attention_heads} query heads; "
                    f"allowed: a multiple of its {layer.num_key_value_heads} KV heads"
                )


class TailoredLlamaModel(LlamaModel):
    """LlamaModel with every decoder layer built from its own widths."""

    config_class = TailoredLlamaConfig

    def __init__(self, config: Any) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaModel.__init__ would build equal layers
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config.per_layer_config[index], index) for index in range(config.num_hidden_layers)
        )
        layer: Any
        for layer in self.layers:
            # Per-layer configurations are copies: set_attn_implementation() only reaches the shared, live one.
            layer.self_attn.config = layer.mlp.config = config
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]


class TailoredLlamaForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM over TailoredLlamaModel."""

    config_class = TailoredLlamaConfig

    def __init__(self, config: Any) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = TailoredLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]
