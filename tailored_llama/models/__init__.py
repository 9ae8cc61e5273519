"""Checkpoints, weights and forward passes: converting, loading, adapters, packed rows."""

from tailored_llama.models import libraries  # noqa: F401, I001 - before all others

from tailored_llama.models import adapters, convert, modeling_tailored_llama
from tailored_llama.models.adapters import add_adapter, merge_adapter, save_adapter
from tailored_llama.models.attention import Header
from tailored_llama.models.cards import (
    CARD,
    Base,
    base_of,
    front_matter,
    is_layered,
    loading,
    pruned_card,
    what_was_removed,
    write_card,
)
from tailored_llama.models.checkpoints import (
    FUSED,
    GGUF_KINDS,
    LAYERED_PREFIX,
    VOCABULARY,
    Layer,
    Size,
    Structure,
    all_tensor_shapes,
    check_checkpoint,
    copy_tokenizer,
    read_config,
    read_structure,
    tensor_shapes,
    weight_bytes,
    weight_files,
)
from tailored_llama.models.convert import fetch_model, find_model, prepare_dense, source_architecture
from tailored_llama.models.devices import check_solver, device_slot, devices_of, pick_device, solver_bytes
from tailored_llama.models.id_table import IdTable, check_teacher, read_id_table
from tailored_llama.models.layouts import BY_LAYER, block_of, layered_config, layout_config, without_layers
from tailored_llama.models.load import check_adapter, head_logits, load_model, load_tokenizer, stored_dtype
from tailored_llama.models.modeling_tailored_llama import LAYERED
from tailored_llama.models.packing import (
    HEAD_POSITIONS,
    Document,
    batches,
    encode_header,
    halved,
    packed_attention,
    packed_inputs,
    packed_logprobs,
    packed_states,
    target_logprobs,
    token_budget,
    within_memory,
)
from tailored_llama.models.passes import PackedRow, run_packed
from tailored_llama.models.quantization import check_installed, check_quantizable, load_base
from tailored_llama.models.shards import tensor_reader, write_shards
from tailored_llama.models.soft_prompts import context_length, has_soft_prompt, learnt_header
from tailored_llama.models.streaming import Forward, Layers, Shelf, caller, enter, layers_of, open_model, streams
from tailored_llama.models.tokens import encode, encode_pair, first_token, pre_tokenizer_name
from tailored_llama.models.vocabulary import Tokens, read_tokens, renumber_generation, renumbered, trim_tokenizer

__all__ = [
    "BY_LAYER", "CARD", "FUSED", "GGUF_KINDS", "HEAD_POSITIONS", "LAYERED", "LAYERED_PREFIX", "VOCABULARY", "Base",
    "Document", "Forward", "Header", "IdTable", "Layer", "Layers", "PackedRow", "Shelf", "Size", "Structure", "Tokens",
    "adapters", "add_adapter", "all_tensor_shapes", "base_of", "batches", "block_of", "caller", "check_adapter",
    "check_checkpoint", "check_installed", "check_quantizable", "check_solver", "check_teacher", "context_length",
    "convert", "copy_tokenizer", "device_slot", "devices_of", "encode", "encode_header", "encode_pair", "enter",
    "fetch_model", "find_model", "first_token", "front_matter", "halved", "has_soft_prompt", "head_logits",
    "is_layered", "layered_config", "layers_of", "layout_config", "learnt_header", "load_base", "load_model",
    "load_tokenizer", "loading", "merge_adapter", "modeling_tailored_llama", "open_model", "packed_attention",
    "packed_inputs", "packed_logprobs", "packed_states", "pick_device", "pre_tokenizer_name", "prepare_dense",
    "pruned_card", "read_config", "read_id_table", "read_structure", "read_tokens", "renumber_generation", "renumbered",
    "run_packed", "save_adapter", "solver_bytes", "source_architecture", "stored_dtype", "streams", "target_logprobs",
    "tensor_reader", "tensor_shapes", "token_budget", "trim_tokenizer", "weight_bytes", "weight_files",
    "what_was_removed", "within_memory", "without_layers", "write_card", "write_shards",
]  # fmt: skip
