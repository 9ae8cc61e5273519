"""Tiny models whose layers are no plain decoder's: hybrids and mixtures of experts, as llama.cpp takes them, too."""

from pathlib import Path
from typing import Any

from helpers import save_tiny_llama

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": LINEAR | {"head_dim": 32, "rope_parameters": ROPE},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 24, "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": MAMBA
    | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0, "num_experts_per_tok": 0}
    | {"shared_intermediate_size": 24, "mamba_expand": 2},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "olmo_hybrid": {},
    "gemma4_text": {
        "vocab_size_per_layer_input": 260,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16,
        "final_logit_softcapping": None,
        "num_kv_shared_layers": 0,
    },
    "nemotron": {"tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # Without a dense layer, no tensor has the intermediate size.
    "qwen3_moe": EXPERTS | {"intermediate_size": 4096, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "glm4": {},
    "apertus": {"tie_word_embeddings": False},  # llama.cpp needs a head
    "cohere": {},  # without a row
    "phi": {"num_key_value_heads": 4, "tie_word_embeddings": False},  # without a row; its head has a bias
}


def save_hybrid(folder: Path, architecture: str, **changes: Any) -> Path:
    sizes = {"pad_token_id": 0} | HYBRIDS[architecture] | changes
    return save_tiny_llama(folder, architecture=architecture, noise=0.1, **sizes)
