"""The plan: which groups each layer keeps, given their importance and a ratio of all parameters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailored_llama.config import PlanConfig
from tailored_llama.errors import InputError
from tailored_llama.pruning.depth import Fixed, Target
from tailored_llama.pruning.groups import KINDS, Groups
from tailored_llama.store import read_table

PLAN_SCHEMA = pa.schema(
    {"group": pa.int32(), "layer": pa.int16(), "kind": pa.string(), "index": pa.int32(), "kept": pa.bool_()}
)
TOLERANCE = 0.001  # fraction of all parameters by which a plan may miss its ratio

Mask = np.ndarray[Any, Any]


def read_plan(folder: Path) -> pa.Table:
    """`plan.parquet` as a table."""
    return read_table(folder / "plan.parquet", PLAN_SCHEMA)


def plan(groups: Groups, scores: Mask, target: Target, pruning: PlanConfig) -> Mask:
    """Choose the groups that stay, bool [groups].

    Args:
        groups: the coupled groups of the model.
        scores: their importance, float [groups].
        target: what is to leave.
        pruning: allocation, attention weight, kinds, protected layers, floors and multiple.

    Raises:
        InputError: the ratio cannot be reached within 0.1 % of all parameters (in tiny models: within one channel). The
            message names the nearest or largest reachable ratio, and the settings that limit it. Or nothing would be
            left of any layer.
    """
    ratio, budget, fixed = target.ratio, target.budget, target.fixed
    _check_reach(groups, target, pruning)
    if pruning.allocation == "uniform":
        removed = _remove_uniformly(groups, scores, budget, pruning)
    else:
        removed = _remove_globally(groups, scores, budget, pruning, fixed)
    if removed.all():
        raise InputError(f"pruning.ratios: got {ratio}; allowed: less, since it leaves no layer")
    blocks = _by_layer(groups, pruning).items()
    reached = int(groups.parameters[removed].sum()) + sum(fixed.get(b, 0) for b, m in blocks if removed[m].all())
    if abs(reached - budget) > max(TOLERANCE * target.total, _grain(groups, pruning)):
        raise InputError(
            f"pruning.ratios: got {ratio}; allowed: {target.ratio_after(reached):.4f}, the nearest that whole groups "
            f"reach with allocation {pruning.allocation}, kinds {', '.join(pruning.kinds)} and channel_multiple "
            f"{pruning.channel_multiple}"
        )
    return ~removed


def _grain(groups: Groups, pruning: PlanConfig) -> int:
    """Parameters of the finest step: one channel, or one per layer. Above the tolerance only in tiny models."""
    channels = _candidates(groups, pruning) & (groups.kind == "mlp")
    if not channels.any():
        return 0
    layers = len(np.unique(groups.layer[channels])) if pruning.allocation == "uniform" else 1
    return layers * int(groups.parameters[channels].max())


def _check_reach(groups: Groups, target: Target, pruning: PlanConfig) -> None:
    """Check that protected layers, floors and multiples leave enough to remove."""
    removable = 0
    for block, members in _by_layer(groups, pruning).items():
        spare = _spare(block[1], len(members), pruning)
        removable += spare * int(groups.parameters[members[0]]) + (
            target.fixed.get(block, 0) if spare == len(members) else 0
        )
    if target.budget > removable:
        largest = np.floor(target.ratio_after(removable) * 1e4) / 1e4
        raise InputError(
            f"pruning.ratios: got {target.ratio}; allowed: at most {largest:.4f} with protect_first "
            f"{pruning.protect_first}, protect_last {pruning.protect_last}, min_channels {pruning.min_channels}, "
            f"min_kv_heads {pruning.min_kv_heads}, channel_multiple {pruning.channel_multiple} and kinds "
            f"{', '.join(pruning.kinds)}"
        )


def _candidates(groups: Groups, pruning: PlanConfig) -> Mask:
    """Mask of the groups whose kind and layer may be pruned."""
    last = int(groups.layer.max()) + 1 - pruning.protect_last
    inside = (groups.layer >= pruning.protect_first) & (groups.layer < last)
    return np.asarray(inside & np.isin(groups.kind, pruning.kinds))


def _by_layer(groups: Groups, pruning: PlanConfig) -> dict[tuple[int, str], Mask]:
    """Indices of the candidates by layer and kind; all groups of one layer and kind have the same size."""
    candidates = _candidates(groups, pruning)
    # One stable sort by layer and kind, then cuts: a search per part would read 353,000 groups 64 times.
    order = np.flatnonzero(candidates)
    keys = groups.layer[order].astype(np.int64) * len(KINDS) + (groups.kind[order] == KINDS[1])
    order = order[np.argsort(keys, kind="stable")]
    parts = np.split(order, np.flatnonzero(np.diff(np.sort(keys))) + 1) if len(order) else []
    return {(int(groups.layer[part[0]]), str(groups.kind[part[0]])): part for part in parts}


def _spare(kind: str, count: int, pruning: PlanConfig) -> int:
    """How many of its `count` groups a layer may lose; it keeps its floor, for channels rounded up to a multiple."""
    if kind == "attention":
        return max(0, count - pruning.min_kv_heads)
    multiple = pruning.channel_multiple
    return max(0, count - -(-pruning.min_channels // multiple) * multiple)


def _remove_globally(groups: Groups, scores: Mask, budget: int, pruning: PlanConfig, fixed: Fixed) -> Mask:
    """Remove the groups of least importance per parameter over all layers and kinds, never more than the budget.

    Scores of attention groups count `attention_weight` times, except FLAP's, which have both signs.

    With a channel multiple, channels go in blocks, a layer's least important ones first. A layer's first block is the
    excess of its width over a multiple.
    """
    scores = _weighted(groups, scores, pruning)
    units: list[Mask] = []
    blocks: list[tuple[int, str]] = []  # of every unit
    left = Counter[tuple[int, str]]()  # groups of every block
    removed = np.zeros(len(groups), dtype=bool)
    for (layer, kind), members in _by_layer(groups, pruning).items():
        order = members[np.argsort(scores[members], kind="stable")][: _spare(kind, len(members), pruning)]
        multiple = pruning.channel_multiple if kind == "mlp" else 1
        parts = np.split(order, range(len(members) % multiple, len(order), multiple)) if len(order) else []
        units += [part for part in parts if len(part)]
        blocks += [(layer, kind)] * (len(units) - len(blocks))
        left[layer, kind] = len(members)
    sizes = np.array([groups.parameters[unit].sum() for unit in units], dtype=np.int64)
    density = np.array([scores[unit].sum() for unit in units]) / sizes if units else np.zeros(0)
    for unit in np.argsort(density, kind="stable"):
        size, block, count = int(sizes[unit]), blocks[unit], len(units[unit])
        size += fixed.get(block, 0) if left[block] == count else 0
        if size <= budget:
            removed[units[unit]] = True
            budget -= size
            left[block] -= count
    return removed


def _weighted(groups: Groups, scores: Mask, pruning: PlanConfig) -> Mask:
    """Scores by which attention groups and channels are ranked together."""
    if pruning.criterion == "flap":
        return scores
    return np.asarray(np.where(groups.kind == "attention", pruning.attention_weight, 1) * scores)


def _remove_uniformly(groups: Groups, scores: Mask, budget: int, pruning: PlanConfig) -> Mask:
    """Remove the same share of every layer: whole KV groups first, then channels for the rest of the budget.

    The number of KV groups is the one nearest to the common share for which the channels can make up the rest. Equal
    layers stay equal, so the budget is met to within one channel of every layer.
    """
    members = _by_layer(groups, pruning)
    share = budget / max(1, sum(int(groups.parameters[m].sum()) for m in members.values()))
    most = max((len(m) for (_, kind), m in members.items() if kind == "attention"), default=1)
    channels = [m for (_, kind), m in members.items() if kind == "mlp"]
    pool = sum(int(groups.parameters[m].sum()) for m in channels)
    best: tuple[int, Mask] | None = None
    for step in sorted(range(most), key=lambda step: abs(step / most - share)):
        removed = np.zeros(len(groups), dtype=bool)
        for (_, kind), heads in members.items():
            if kind == "attention":
                count = min(round(step / most * len(heads)), _spare(kind, len(heads), pruning))
                _remove_least(removed, heads, scores, count)
        rest = budget - int(groups.parameters[removed].sum())
        if rest > 0 and pool:
            for layer in channels:
                kept = len(layer) - int(rest / pool * len(layer))
                kept = round(kept / pruning.channel_multiple) * pruning.channel_multiple
                _remove_least(removed, layer, scores, min(len(layer) - kept, _spare("mlp", len(layer), pruning)))
        miss = abs(budget - int(groups.parameters[removed].sum()))
        if best is None or miss < best[0]:
            best = miss, removed
        if rest >= 0 and miss <= sum(int(groups.parameters[m[0]]) for m in channels):
            return removed
    assert best is not None
    return best[1]


def _remove_least(removed: Mask, members: Mask, scores: Mask, count: int) -> None:
    removed[members[np.argsort(scores[members], kind="stable")[: max(0, count)]]] = True
