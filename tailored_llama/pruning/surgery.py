"""Surgery: write a checkpoint without the groups that a plan removes, tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tailored_llama.models import (
    LAYERED,
    LAYERED_PREFIX,
    VOCABULARY,
    Layer,
    all_tensor_shapes,
    block_of,
    copy_tokenizer,
    layout_config,
    modeling_tailored_llama,
    read_config,
    read_structure,
    read_tensor,
    renumber_generation,
    renumbered,
    tensor_shapes,
    trim_tokenizer,
    weight_files,
    without_layers,
    write_shards,
)
from tailored_llama.pruning.groups import Groups, read_slices
from tailored_llama.pruning.vocabulary import VocabularyPlan

_MODELING_FILE = Path(modeling_tailored_llama.__file__)


def kept_layers(groups: Groups, kept: np.ndarray[Any, Any], share: list[int]) -> tuple[Layer, ...]:
    """Widths of every layer after a plan; 0 of a block that loses all its groups.

    Args:
        groups: the coupled groups.
        kept: whether each group stays, bool [groups].
        share: query heads per KV head, by layer; surgery removes whole groups, so it never changes.
    """
    layers = []
    for number, ratio in enumerate(share):
        members = kept & (groups.layer == number)
        kv_heads = int(np.sum(members & (groups.kind == "attention")))
        layers.append(Layer(kv_heads * ratio, kv_heads, int(np.sum(members & (groups.kind == "mlp")))))
    return tuple(layers)


def prune_checkpoint(
    dense: Path,
    groups_folder: Path,
    groups: Groups,
    kept: np.ndarray[Any, Any],
    out: Path,
    fitted: Sequence[Path] = (),
    tokens: VocabularyPlan | None = None,
) -> None:
    """Write the checkpoint without the groups that are not in `kept`, and its tokenizer.

    A block without groups leaves with its norms, and a layer without blocks leaves; the others are numbered anew.

    The model is never built: each tensor is read, sliced along the dimensions that its groups own, and written.
    Memory: one shard of the pruned model, which is 2 GB, or one tensor if that is larger.

    Args:
        dense: the dense checkpoint.
        groups_folder: the groups artifact of that checkpoint.
        groups: the same groups, already read.
        kept: whether each group stays, bool [groups].
        out: an existing folder.
        fitted: safetensors files whose tensors, in the pruned model's shapes, replace the dense ones.
        tokens: which tokens stay; None: all.
    """
    files = weight_files(dense)
    shapes = all_tensor_shapes(dense)
    files_by_name, sizes = dict[str, Path](), dict[str, list[int]]()
    for file in (*files, *fitted):
        for name, shape in tensor_shapes(file).items():
            files_by_name[name], sizes[name] = file, shape
    layers = kept_layers(groups, kept, [layer.share for layer in read_structure(dense).layers])
    keep: dict[str, list[tuple[int, np.ndarray[Any, Any]]]] = {}
    for slices in read_slices(groups_folder, shapes):
        stays = np.where(slices.owner < 0, True, kept[slices.owner])
        if not stays.all() and files_by_name[slices.parameter] not in fitted:
            keep.setdefault(slices.parameter, []).append((slices.dim, np.flatnonzero(stays)))
    source = read_config(dense)
    if tokens:
        source = renumbered(source, tokens.kept)
        for name in set(VOCABULARY) & shapes.keys():
            keep[name] = [(0, np.array(tokens.kept))]
    for name, cuts in keep.items():
        for dim, indices in cuts:
            sizes[name][dim] = len(indices)
    if any(name.endswith("_proj.bias") and name not in shapes for name in files_by_name):
        source |= {"attention_bias": True, "mlp_bias": True}
        for name in [n for n in sizes if n.endswith("_proj.weight")]:
            sizes.setdefault(name.removesuffix("weight") + "bias", sizes[name][:1])
    gone = [number for number, layer in enumerate(layers) if not (layer.heads or layer.channels)]
    left = tuple(layer for number, layer in enumerate(layers) if number not in gone)
    config = layout_config(without_layers(source, gone), left)
    old_names = {new: name for name in sizes if (new := _new_name(name, layers, gone, source["model_type"]))}
    dtype = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype or torch.float32

    def tensor(new: str) -> torch.Tensor:
        name = old_names[new]
        if name not in files_by_name:
            return torch.zeros(sizes[name], dtype=dtype)
        data = read_tensor(files_by_name[name], name)
        for dim, indices in keep.get(name, []):
            data = data.index_select(dim, torch.from_numpy(indices))
        return data.contiguous()

    write_shards(out, {new: sizes[name] for new, name in old_names.items()}, dtype, tensor)
    if config.model_type in LAYERED:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    else:
        parts = LAYERED[config.model_type.removeprefix(LAYERED_PREFIX)]
        config.architectures = [parts[-1].__name__]
        classes = zip(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), parts, strict=True)
        config.auto_map = {auto: f"{_MODELING_FILE.stem}.{part.__name__}" for auto, part in classes}
        shutil.copyfile(_MODELING_FILE, out / _MODELING_FILE.name)
    config.save_pretrained(out)
    if tokens:
        trim_tokenizer(dense, tokens.kept, tokens.shares.tolist(), out)
        renumber_generation(dense, tokens.kept, out)
    else:
        copy_tokenizer(dense, out)


def _new_name(name: str, layers: Sequence[Layer], gone: Sequence[int], model_type: str) -> str | None:
    """A tensor's name once layers are gone; None if its own block is."""
    block = block_of(name, model_type)
    if block is None:
        return name
    number, kind = block
    if not (layers[number].heads if kind == "attention" else layers[number].channels):
        return None
    prefix = "model.layers."
    rest = name.removeprefix(f"{prefix}{number}.")
    return f"{prefix}{number - sum(other < number for other in gone)}.{rest}"
