"""Surgery: plan what leaves a model, and write the checkpoint without it, tensor by tensor."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tailored_llama import models
from tailored_llama.config import PlanConfig
from tailored_llama.pruning.groups import Array, Groups, Stays, owners_of, read_groups, staying
from tailored_llama.pruning.importance import read_importance
from tailored_llama.pruning.plan import keep, plan
from tailored_llama.pruning.vocabulary import VocabularyPlan


@dataclass(frozen=True)
class Planned:
    """What a cut is planned from: folders, the ratio and its limits. Only numbers are right without importance."""

    dense: Path
    groups: Path
    importance: Path | None
    ratio: float
    limits: PlanConfig


@dataclass(frozen=True)
class Cut:
    """The parts that stay: groups, bool [groups]; the indices of each parameter; widths; and tokens (None: all)."""

    dense: Path
    groups: Groups
    kept: Array
    stays: Stays
    layer: models.Layer
    tokens: VocabularyPlan | None


def plan_cut(planned: Planned, tokens: VocabularyPlan | None = None) -> Cut:
    """Plan what leaves, so that with the tokens a ratio of the parameters is gone.

    Raises:
        InputError: as in `plan`.
    """
    dense, groups, structure = planned.dense, read_groups(planned.groups), models.read_structure(planned.dense)
    gone = (structure.size.vocab_size - len(tokens.kept)) * structure.size.row if tokens else 0
    scores = read_importance(planned.importance) if planned.importance else np.zeros(len(groups))
    layer, config = structure.layer, models.read_config(dense)

    def with_heads(kv_heads: int) -> models.Layer:
        return replace(layer, heads=kv_heads * layer.share, kv_heads=kv_heads)

    leaving = plan(
        groups,
        planned.limits,
        structure.parameters,
        planned.ratio,
        gone,
        fits=lambda kv_heads: models.has_layout(config, with_heads(kv_heads)),
    )
    kept = keep(groups, scores, leaving)
    stays = staying(owners_of(dense), kept)
    left = replace(with_heads(layer.kv_heads - leaving["attention"]), channels=layer.channels - leaving["mlp"])
    return Cut(dense, groups, kept, stays, left, tokens)


def prune_checkpoint(
    dense: Path,
    layer: models.Layer,
    stays: Stays,
    out: Path,
    fitted: Sequence[Path] = (),
    tokens: VocabularyPlan | None = None,
) -> None:
    """Write a checkpoint without the groups that a plan removes, and its tokenizer, into an existing folder.

    `fitted` are safetensors files whose tensors, in the pruned model's shapes, replace the dense ones. Without
    `tokens`, all tokens stay. The model is never built: memory holds a shard of 500 MB, or one larger tensor.
    """
    config, shapes = models.read_config(dense), models.all_tensor_shapes(dense)
    kept = {name: (dim, np.flatnonzero(mask)) for name, (dim, mask) in stays.items()}
    if tokens:
        config = models.renumbered(config, tokens.kept)
        kept |= {name: (0, np.array(tokens.kept)) for name in models.VOCABULARY if name in shapes}
    for name, (dim, indices) in kept.items():  # a tensor without indices stays whole
        shapes[name][dim] = len(indices)
    read = models.tensor_reader((*models.weight_files(dense), *fitted))
    done = {name for file in fitted for name in models.tensor_shapes(file)}

    def make(name: str) -> Tensor:
        tensor = read(name)
        if name in kept and name not in done:
            dim, indices = kept[name]
            tensor = tensor.index_select(dim, torch.from_numpy(indices))
        return tensor.contiguous()

    models.write_shards(out, shapes, models.stored_dtype(dense), make)
    _write_config(config, layer, out)
    if tokens:
        models.trim_tokenizer(dense, tokens.kept, tokens.shares.tolist(), out)
        models.renumber_generation(dense, tokens.kept, out)
    else:
        models.copy_tokenizer(dense, out)
    models.copy_licence(dense, out)


def _write_config(config: dict[str, Any], layer: models.Layer, out: Path) -> None:
    """Write `config.json` for layers of these widths; where only tokens leave, what it states of layers stays."""
    if models.family_of(config["model_type"]).level == "tokens":
        (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    stock = models.layout_config(config, layer)
    stock.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[stock.model_type]]
    stock.save_pretrained(out)
