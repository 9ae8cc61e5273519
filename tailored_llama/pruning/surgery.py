"""Surgery: write a checkpoint without the groups that a plan removes, tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tailored_llama import models
from tailored_llama.pruning.groups import KINDS, Array, Groups, Stays
from tailored_llama.pruning.vocabulary import VocabularyPlan

_MODELING_FILE = Path(models.modeling_tailored_llama.__file__)


def prune_checkpoint(
    dense: Path,
    layers: Sequence[models.Layer],
    stays: Stays,
    out: Path,
    fitted: Sequence[Path] = (),
    tokens: VocabularyPlan | None = None,
) -> None:
    """Write a checkpoint without the groups that a plan removes, and its tokenizer, into an existing folder.

    `fitted` are safetensors files whose tensors, in the pruned model's shapes, replace the dense ones. Without
    `tokens`, all tokens stay.

    The model is never built: each tensor is read, sliced along the dimensions that its groups own, and written.
    Memory: one shard of the pruned model, which is 2 GB, or one tensor if that is larger.
    """
    config, dense_shapes = models.read_config(dense), models.all_tensor_shapes(dense)
    fitted_shapes = {name: shape for file in fitted for name, shape in models.tensor_shapes(file).items()}
    indices = {name: (d, np.flatnonzero(mask)) for name, (d, mask) in stays.items() if name not in fitted_shapes}
    if tokens:
        config = models.renumbered(config, tokens.kept)
        indices |= {name: (0, np.array(tokens.kept)) for name in models.VOCABULARY if name in dense_shapes}
    shapes = dense_shapes | fitted_shapes
    for name, (dim, own) in indices.items():  # a tensor without indices stays whole
        shapes[name][dim] = len(own)
    pruned_config = models.layout_config(config, tuple(layers))
    dtype = getattr(torch, str(pruned_config.dtype or "float32").removeprefix("torch."))
    read = models.tensor_reader((*models.weight_files(dense), *fitted))

    def make(name: str) -> Tensor:
        tensor = read(name)
        if cut := indices.get(name):
            tensor = tensor.index_select(cut[0], torch.from_numpy(cut[1]))
        return tensor.contiguous()

    models.write_shards(out, shapes, dtype, make)
    _save_config(pruned_config, out)
    if tokens:
        models.trim_tokenizer(dense, tokens.kept, tokens.shares.tolist(), out)
        models.renumber_generation(dense, tokens.kept, out)
    else:
        models.copy_tokenizer(dense, out)
    models.copy_licence(dense, out)


def kept_layers(groups: Groups, kept: Array, dense: Sequence[models.Layer]) -> tuple[models.Layer, ...]:
    """Widths of every layer if the groups of a mask, bool [groups], stay; 0 of a block without groups.

    A KV head leaves with all the query heads that share it, so their ratio never changes.
    """
    left = {block: int(kept[members].sum()) for block, members in groups.by_block().items()}
    kv_heads, channels = ([left.get((number, kind), 0) for number in range(len(dense))] for kind in KINDS)
    return tuple(
        models.Layer(kv * layer.share, kv, width) for layer, kv, width in zip(dense, kv_heads, channels, strict=True)
    )


def _save_config(config: Any, out: Path) -> None:
    """Write `config.json`; where layers have their own widths, with the modeling code that it needs."""
    if config.model_type in models.LAYERED:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    else:
        parts = models.LAYERED[config.model_type.removeprefix(models.LAYERED_PREFIX)]
        config.architectures = [parts[-1].__name__]
        classes = zip(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), parts, strict=True)
        config.auto_map = {auto: f"{_MODELING_FILE.stem}.{part.__name__}" for auto, part in classes}
        shutil.copyfile(_MODELING_FILE, out / _MODELING_FILE.name)
    config.save_pretrained(out)
