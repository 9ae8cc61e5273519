"""Importance from the inputs of a layer's two output projections: one forward pass, no gradient."""

from __future__ import annotations

from typing import Any

import torch

from tailored_llama.config import Criterion
from tailored_llama.models import caller, layers_of
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Array, Groups, Slices, add_scores, zero_scores
from tailored_llama.pruning.layerwise import Text, enter_all, watching


def activation_scores(
    model: Any, text: Text, slices: list[Slices], groups: Groups, criterion: Criterion, progress: Progress = silent
) -> Array:
    """Importance from weights and calibration activations of the o_proj and down_proj columns that each group owns.

    With X_j the j-th input of the projection over all calibration tokens and W_j the matching column of the weight:

    * `wanda_sp`: Σ |W_j|·‖X_j‖₂ (Wanda, arXiv 2306.11695, equation 1, summed over the column);
    * `flap`: Var(X_j)·‖W_j‖² (FLAP, arXiv 2312.11983, its metric WIFV), standardised within each layer and kind, so
      that layers can be ranked against each other.

    Known deviation: FLAP ranks heads and channels by score alone. The global ranking here is by score per parameter,
    so each score is multiplied by the group's parameter count, which keeps FLAP's order.

    Args:
        model: a causal LM, streamed or not.
        criterion: `wanda_sp` or `flap`.
        progress: called after every layer and batch.
    """
    owned = {part.parameter.removesuffix(".weight"): part for part in slices if part.dim == 1}
    names = {module: name for name, module in model.named_modules() if name in owned}
    layers, batches, count = layers_of(model), text.batches(), text.input_ids.numel()
    scores = zero_scores(slices)
    with torch.inference_mode(), layers.shelf() as shelf:
        arguments = enter_all(model, batches, shelf)
        for number, layer in layers.forward():
            moments = {  # sum and sum of squares of every input over all tokens
                module: torch.zeros(2, module.in_features, dtype=torch.float64, device=module.weight.device)
                for module in layer.modules()
                if module in names
            }
            for index, further in enumerate(arguments):
                forward = caller(layer, further[number])
                with watching(moments) as seen:
                    shelf[number + 1, index] = forward(shelf[number, index])
                for module, sums in moments.items():
                    inputs = seen[module].inputs.flatten(0, -2).double()
                    sums += torch.stack([inputs.sum(0), inputs.square().sum(0)])
                shelf.drop((number, index))
                progress(number * len(batches) + index + 1, len(layers) * len(batches))
            for module, (sums, squares) in moments.items():
                weight = module.weight.detach().float()
                if criterion == "wanda_sp":
                    values = weight.abs().sum(0).double() * squares.sqrt()
                else:
                    variance = (squares - sums.square() / count).clamp_min(0) / max(1, count - 1)
                    values = weight.square().sum(0).double() * variance
                add_scores(scores, owned[names[module]], values)
    totals: Array = scores.numpy()
    if criterion == "flap":
        for members in groups.by_block().values():
            own = totals[members]
            deviation = own.std()
            totals[members] = (own - own.mean()) / deviation if deviation > 0 else 0  # equal scores become zero
        totals *= groups.parameters
    return totals
