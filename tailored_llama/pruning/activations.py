"""Importance from the inputs of a layer's two output projections: one forward pass, no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailored_llama.config import Criterion
from tailored_llama.data import sequences_at_once
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Groups, Slices, add_scores


def activation_scores(
    model: Any,
    input_ids: Tensor,
    slices: list[Slices],
    groups: Groups,
    criterion: Criterion,
    progress: Progress = silent,
    batch_tokens: int | None = None,
) -> np.ndarray[Any, Any]:
    """Importance from weights and calibration activations of the o_proj and down_proj columns that each group owns.

    With X_j the j-th input of the projection over all calibration tokens and W_j the matching column of the weight:

    * `wanda_sp`: Σ |W_j|·‖X_j‖₂ (Wanda, arXiv 2306.11695, equation 1, summed over the column);
    * `flap`: Var(X_j)·‖W_j‖² (FLAP, arXiv 2312.11983, its metric WIFV), standardised within each layer and kind, so
      that layers can be ranked against each other.

    Known deviation: FLAP ranks heads and channels by score alone. The global ranking here is by score per parameter,
    so each score is multiplied by the group's parameter count, which keeps FLAP's order.

    Args:
        model: a causal LM.
        input_ids: int64 [samples, tokens].
        slices: which group owns which index of which parameter.
        groups: all coupled groups.
        criterion: `wanda_sp` or `flap`.
        progress: called after every batch.
        batch_tokens: most tokens per forward pass; None: 4,096.
    """
    owned = {part.parameter.removesuffix(".weight"): part for part in slices if part.dim == 1}
    modules = {name: module for name, module in model.named_modules() if name in owned}
    sums, squares = _moments(model, modules, input_ids, progress, batch_tokens)
    count = input_ids.numel()
    scores = torch.zeros(len(groups), dtype=torch.float64)
    for name, module in modules.items():
        weight = module.weight.detach().float()
        if criterion == "wanda_sp":
            values = weight.abs().sum(0).double() * squares[name].sqrt()
        else:
            variance = (squares[name] - sums[name].square() / count).clamp_min(0) / max(1, count - 1)
            values = weight.square().sum(0).double() * variance
        add_scores(scores, owned[name], values)
    totals = scores.numpy()
    return totals if criterion == "wanda_sp" else _standardised(totals, groups) * groups.parameters


def _moments(
    model: Any, modules: dict[str, Any], input_ids: Tensor, progress: Progress, batch_tokens: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sum and sum of squares of every input of each module over all tokens, float64 [in]."""
    shapes = {name: module.weight.shape[1] for name, module in modules.items()}
    sums, squares = (
        {name: torch.zeros(size, dtype=torch.float64, device=model.device) for name, size in shapes.items()}
        for _ in range(2)
    )

    def hook(name: str) -> Callable[..., None]:
        def before(module: Any, inputs: tuple[Tensor]) -> None:
            states = inputs[0].flatten(0, -2).double()
            sums[name] += states.sum(0)
            squares[name] += states.square().sum(0)

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    batches = input_ids.split(sequences_at_once(input_ids, batch_tokens))
    try:
        with torch.inference_mode():
            for done, batch in enumerate(batches):
                model.model(input_ids=batch.to(model.device), use_cache=False)
                progress(done + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()
    return sums, squares


def _standardised(scores: np.ndarray[Any, Any], groups: Groups) -> np.ndarray[Any, Any]:
    """Scale to zero mean and unit deviation within every layer and kind; equal scores become zero."""
    result = np.zeros_like(scores)
    for layer in np.unique(groups.layer):
        for kind in np.unique(groups.kind):
            members = (groups.layer == layer) & (groups.kind == kind)
            deviation = scores[members].std() if members.any() else 0.0
            if deviation > 0:
                result[members] = (scores[members] - scores[members].mean()) / deviation
    return result
