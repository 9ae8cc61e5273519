"""Depth: whole decoder layers that leave, and the parameters that leave with a block's last group."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import cosine_similarity

from tailored_llama.config import PlanConfig
from tailored_llama.errors import InputError
from tailored_llama.models import all_tensor_shapes, block_of, layers_of, read_config
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Array, Groups
from tailored_llama.pruning.layerwise import Text, enter_all
from tailored_llama.store import read_table

INFLUENCE_SCHEMA = pa.schema({"layer": pa.int16(), "influence": pa.float64()})

Fixed = Mapping[tuple[int, str], int]  # layer and kind of a block → its parameters that are in no group


@dataclass(frozen=True)
class Target:
    """What a plan is to reach, in parameters.

    `ratio` is the fraction to remove of `total`, the dense model's; `gone` of them have left already. `fixed` are those
    of each block that leave with its last group.
    """

    total: int
    ratio: float
    gone: int = 0
    fixed: Fixed = field(default_factory=dict)

    @property
    def budget(self) -> int:
        """How many are still to leave."""
        return round(self.ratio * self.total) - self.gone

    def ratio_after(self, removed: int) -> float:
        """The ratio once so many more have left."""
        return (self.gone + removed) / self.total


def block_influence(model: Any, text: Text, progress: Progress = silent) -> Array:
    """1 − the mean cosine between each layer's input and output hidden states (ShortGPT, arXiv 2403.03853, equation 1).

    Returns:
        float64 [layers]; a layer of low influence changes the states least.
    """
    layers, influence = layers_of(model), np.zeros(len(layers_of(model)))
    with torch.inference_mode(), layers.shelf() as shelf:
        arguments = enter_all(model, text.batches(), shelf)
        for number, layer in layers.each():
            alike = 0.0
            for index, further in enumerate(arguments):
                before = shelf[number, index]
                shelf[number + 1, index] = after = layer(before, **further[number])
                alike += float(cosine_similarity(before.to(after.device).double(), after.double(), dim=-1).sum())
                shelf.drop((number, index))
            influence[number] = 1 - alike / text.input_ids.numel()
            progress(number + 1, len(layers))
    return influence


def read_influence(folder: Path) -> Array:
    """The influence of every layer, float64 [layers]."""
    return np.asarray(read_table(folder / "influence.parquet", INFLUENCE_SCHEMA)["influence"].to_numpy())


def fixed_parameters(checkpoint: Path, groups: Groups) -> dict[tuple[int, str], int]:
    """How many parameters of each block are in none of its groups: norms, and biases of output projections.

    They stay as long as one group of the block does.
    """
    model_type, fixed = str(read_config(checkpoint)["model_type"]), defaultdict[tuple[int, str], int](int)
    for name, shape in all_tensor_shapes(checkpoint).items():
        if block := block_of(name, model_type):
            fixed[block] += math.prod(shape)
    for block, members in groups.by_block().items():
        fixed[block] -= int(groups.parameters[members].sum())
    return dict(fixed)


def choose_layers(
    groups: Groups, influence: Array | None, target: Target, pruning: PlanConfig
) -> tuple[list[int], int]:
    """Choose the layers that leave, those of the least influence: as many as configured or, if no other kind supplies
    the rest of the ratio, as many as come nearest to it.

    Where the influence, float [layers], is not known yet, the smallest layers stand for those chosen.

    Returns:
        The layers, ascending, and their parameters.

    Raises:
        InputError: there are too few layers, or they are larger than the ratio. Where only layers leave: the ratio is
            missed by more than half a layer.
    """
    count = int(groups.layer.max()) + 1
    sizes = np.bincount(groups.layer, groups.parameters, minlength=count).astype(np.int64)
    for (layer, _), parameters in target.fixed.items():
        sizes[layer] += parameters
    inside = range(pruning.protect_first, count - pruning.protect_last)
    ranks = sizes if influence is None else influence
    order = sorted(inside, key=lambda layer: (ranks[layer], layer))[: count - 1]  # one layer stays
    sums = np.cumsum([0, *(sizes[layer] for layer in order)])  # parameters of the first 0, 1, … of them
    number, budget = pruning.layers, target.budget
    if number:
        most = len(order)
        if number <= most and sums[number] > budget:
            most = int(np.sum(sums[1:] <= budget))
        if number > most:
            raise InputError(
                f"pruning.layers: got {number}; allowed: at most {most} with pruning.ratios {target.ratio}, "
                f"protect_first {pruning.protect_first} and protect_last {pruning.protect_last}"
            )
    else:
        number = int(np.argmin(np.abs(sums[1:] - budget))) + 1 if order else 0
        if abs(sums[number] - budget) > sizes.max() / 2:
            raise InputError(
                f"pruning.ratios: got {target.ratio}; allowed: {target.ratio_after(sums[number]):.4f}, the nearest "
                f"that whole layers reach with protect_first {pruning.protect_first} and protect_last "
                f"{pruning.protect_last}"
            )
    return sorted(order[:number]), int(sums[number])
