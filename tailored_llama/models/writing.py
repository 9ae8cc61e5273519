"""Writing checkpoints: their configuration, and their weights in shards, so that memory never holds a whole model."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import MistralConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tailored_llama.models.checkpoints import WIDTHS, Layer, head_dim_of, tensor_shapes

BY_LAYER = ("layer_types", "no_rope_layers")  # fields of a configuration with one value per layer
_SHARD = 500 * 10**6  # bytes, which memory holds while they are written


def layout_config(dense: dict[str, Any], layer: Layer) -> Any:
    """The stock configuration of a checkpoint whose layers have these widths, with an explicit head_dim.

    Some stock configurations require the head count to divide the hidden size. If it does not, a Llama without biases
    becomes a MistralConfig without a sliding window, which is the same architecture; others are refused by transformers
    (see `has_layout`).
    """
    dropped = ("model_type", "architectures", "auto_map", "transformers_version")
    fields = {name: value for name, value in dense.items() if name not in dropped}
    fields |= {"head_dim": head_dim_of(dense), **dict(zip(WIDTHS, astuple(layer), strict=True))}
    stock = CONFIG_MAPPING[dense["model_type"]]
    try:
        return stock(**fields)
    except StrictDataclassClassValidationError:
        if stock.model_type != "llama" or fields.get("attention_bias") or fields.get("mlp_bias"):
            raise
        return MistralConfig(**(fields | {"sliding_window": None}))


def has_layout(dense: dict[str, Any], layer: Layer) -> bool:
    """Return whether `layout_config` has a configuration for layers of these widths."""
    try:
        layout_config(dense, layer)
    except StrictDataclassClassValidationError:
        return False
    return True


def write_shards(
    out: Path, sizes: Mapping[str, Sequence[int]], dtype: torch.dtype, tensor: Callable[[str], Tensor]
) -> None:
    """Write weights of these shapes: one file, or shards of 500 MB with an index; `tensor` makes one when it is due."""
    without_data = {name: torch.empty(tuple(size), dtype=dtype, device="meta") for name, size in sizes.items()}
    shards = split_torch_state_dict_into_shards(without_data, max_shard_size=_SHARD)
    for shard, names in shards.filename_to_tensors.items():
        save_file({name: tensor(name) for name in names}, out / shard, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def tensor_reader(files: Iterable[Path]) -> Callable[[str], Tensor]:
    """A function that reads a tensor of safetensors files by name; where files share one, the last has it.

    Each tensor is a copy. A mapped one keeps its whole file mapped, and a system with strict overcommit refuses many.
    """
    files_by_name = {name: file for file in files for name in tensor_shapes(file)}

    def read(name: str) -> Tensor:
        with safe_open(files_by_name[name], framework="pt") as tensors:
            data: Tensor = tensors.get_tensor(name).clone()
        return data

    return read


def is_unchanged(file: Path, dtype: torch.dtype) -> bool:
    """Return whether a safetensors file is already as `write_shards` would write its tensors."""
    with safe_open(file, framework="pt") as reader:
        types = {reader.get_slice(name).get_dtype() for name in reader.keys()}  # noqa: SIM118 (not a dict)
        written = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        return bool(types == {written} and (reader.metadata() or {}).get("format") == "pt")


def link(file: Path, target: Path) -> None:
    """Hard-link a file, which takes no space; copy it if it lies on another disk."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)
