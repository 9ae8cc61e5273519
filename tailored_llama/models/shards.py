"""Writing checkpoints in shards, so that memory holds one shard and never the whole model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tailored_llama.models.checkpoints import tensor_shapes

_SHARD = 2 * 10**9  # bytes


def write_shards(
    out: Path, sizes: Mapping[str, Sequence[int]], dtype: torch.dtype, tensor: Callable[[str], Tensor]
) -> None:
    """Write the weights of a checkpoint to an existing folder: one file, or shards of at most 2 GB with their index.

    `sizes` are the shapes of all tensors, by name. `tensor` makes one, and is called when its shard is written.
    """
    without_data = {name: torch.empty(tuple(size), dtype=dtype, device="meta") for name, size in sizes.items()}
    shards = split_torch_state_dict_into_shards(without_data, max_shard_size=_SHARD)
    for shard, names in shards.filename_to_tensors.items():
        save_file({name: tensor(name) for name in names}, out / shard, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def tensor_reader(files: Iterable[Path]) -> Callable[[str], Tensor]:
    """A function that reads a tensor of safetensors files by name; where files share one, the last has it.

    Each tensor is a copy. One that is mapped would keep its whole file mapped, and the mappings of many would add up to
    many times the model's size in addresses, which a system with strict overcommit refuses.
    """
    files_by_name = {name: file for file in files for name in tensor_shapes(file)}

    def read(name: str) -> Tensor:
        with safe_open(files_by_name[name], framework="pt") as tensors:
            data: Tensor = tensors.get_tensor(name).clone()
        return data

    return read


def is_unchanged(file: Path, dtype: torch.dtype) -> bool:
    """Whether a safetensors file is already as `write_shards` would write its tensors."""
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
