"""The plan: which groups each layer keeps, from their importance and a ratio of all parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailored_llama.artifacts import read_table
from tailored_llama.config import PruningConfig
from tailored_llama.errors import InputError
from tailored_llama.pruning.groups import KINDS, Groups

PLAN_SCHEMA = pa.schema(
    {"group": pa.int32(), "layer": pa.int16(), "kind": pa.string(), "index": pa.int32(), "kept": pa.bool_()}
)
TOLERANCE = 0.001  # of all parameters: how far a plan may miss its ratio

Mask = np.ndarray[Any, Any]


def read_plan(folder: Path) -> pa.Table:
    """`plan.parquet` as a table."""
    return read_table(folder / "plan.parquet", PLAN_SCHEMA)


def plan(groups: Groups, scores: Mask, total: int, ratio: float, pruning: PruningConfig, gone: int = 0) -> Mask:
    """Which groups stay, bool [groups].

    Args:
        groups: the coupled groups of the model.
        scores: their importance, float [groups].
        total: parameters of the dense model.
        ratio: fraction of `total` to remove.
        pruning: allocation, weight of attention, kinds, protected layers, floors and multiple.
        gone: parameters of `total` that an earlier step has removed.

    Raises:
        InputError: `ratio` cannot be reached within 0.1 % of all parameters (in tiny models: within one channel); the
            nearest or the largest that can is named, and what stands in the way.
    """
    budget = round(ratio * total) - gone
    _check_reach(groups, total, ratio, budget, pruning)
    if pruning.allocation == "global":
        removed = _remove_globally(groups, scores, budget, pruning)
    else:
        removed = _remove_uniformly(groups, scores, budget, pruning)
    reached = int(groups.parameters[removed].sum())
    if abs(reached - budget) > max(TOLERANCE * total, _grain(groups, pruning)):
        raise InputError(
            f"pruning.ratios: got {ratio}; allowed: {(reached + gone) / total:.4f}, the nearest that whole groups "
            f"reach with allocation {pruning.allocation}, kinds {', '.join(pruning.kinds)} and channel_multiple "
            f"{pruning.channel_multiple}"
        )
    return ~removed


def _grain(groups: Groups, pruning: PruningConfig) -> int:
    """Parameters of the finest step, one channel (or one of every layer): above the tolerance in tiny models only."""
    channels = _candidates(groups, pruning) & (groups.kind == "mlp")
    if not channels.any():
        return 0
    layers = len(np.unique(groups.layer[channels])) if pruning.allocation == "uniform" else 1
    return layers * int(groups.parameters[channels].max())


def _check_reach(groups: Groups, total: int, ratio: float, budget: int, pruning: PruningConfig) -> None:
    """Check that protected layers, floors and multiples leave enough to remove."""
    removable = sum(
        _spare(kind, len(here), pruning) * int(groups.parameters[here[0]])
        for (_, kind), here in _by_layer(groups, pruning).items()
    )
    if budget > removable:
        largest = (round(ratio * total) - budget + removable) / total
        raise InputError(
            f"pruning.ratios: got {ratio}; allowed: at most {np.floor(largest * 1e4) / 1e4:.4f} with protect_first "
            f"{pruning.protect_first}, protect_last {pruning.protect_last}, min_channels {pruning.min_channels}, "
            f"min_kv_heads {pruning.min_kv_heads}, channel_multiple {pruning.channel_multiple} and kinds "
            f"{', '.join(pruning.kinds)}"
        )


def _candidates(groups: Groups, pruning: PruningConfig) -> Mask:
    """Groups of the kinds and layers that may lose some."""
    last = int(groups.layer.max()) + 1 - pruning.protect_last
    inside = (groups.layer >= pruning.protect_first) & (groups.layer < last)
    return np.asarray(inside & np.isin(groups.kind, pruning.kinds))


def _by_layer(groups: Groups, pruning: PruningConfig) -> dict[tuple[int, str], Mask]:
    """The candidates of each layer and kind, by index; all groups of one layer and kind have the same size."""
    candidates = _candidates(groups, pruning)
    # a stable sort by layer and kind, so that each part is found by cutting, not by searching 353,000 groups 64 times
    order = np.flatnonzero(candidates)
    keys = groups.layer[order].astype(np.int64) * len(KINDS) + (groups.kind[order] == KINDS[1])
    order = order[np.argsort(keys, kind="stable")]
    parts = np.split(order, np.flatnonzero(np.diff(np.sort(keys))) + 1) if len(order) else []
    return {(int(groups.layer[part[0]]), str(groups.kind[part[0]])): part for part in parts}


def _spare(kind: str, count: int, pruning: PruningConfig) -> int:
    """How many of `count` groups a layer may lose: it keeps its floor, and a multiple of channels."""
    if kind == "attention":
        return max(0, count - pruning.min_kv_heads)
    multiple = pruning.channel_multiple
    return max(0, count - -(-pruning.min_channels // multiple) * multiple)


def _remove_globally(groups: Groups, scores: Mask, budget: int, pruning: PruningConfig) -> Mask:
    """Remove by least importance per parameter, over all layers and kinds, never more than the budget.

    That of attention groups counts `attention_weight` times; FLAP's scores have both signs and are left as they are.

    With a channel multiple, channels go in blocks: a layer's least important ones first, and first of all as many as
    its width is above a multiple.
    """
    if pruning.criterion != "flap":
        scores = np.where(groups.kind == "attention", pruning.attention_weight, 1) * scores
    units: list[Mask] = []
    for (_, kind), here in _by_layer(groups, pruning).items():
        order = here[np.argsort(scores[here], kind="stable")][: _spare(kind, len(here), pruning)]
        multiple = pruning.channel_multiple if kind == "mlp" else 1
        units += np.split(order, range(len(here) % multiple, len(order), multiple)) if len(order) else []
    units = [unit for unit in units if len(unit)]
    sizes = np.array([groups.parameters[unit].sum() for unit in units], dtype=np.int64)
    density = np.array([scores[unit].sum() for unit in units]) / sizes if units else np.zeros(0)
    removed = np.zeros(len(groups), dtype=bool)
    for unit in np.argsort(density, kind="stable"):
        if sizes[unit] <= budget:
            removed[units[unit]] = True
            budget -= int(sizes[unit])
    return removed


def _remove_uniformly(groups: Groups, scores: Mask, budget: int, pruning: PruningConfig) -> Mask:
    """Remove the same share of every layer: whole KV groups first, channels for the rest of the budget.

    Of all numbers of KV groups the one nearest to the common share is taken for which the channels can make up the
    rest. Equal layers stay equal, so the budget is met to within one channel of every layer.
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
            for here in channels:
                kept = len(here) - int(rest / pool * len(here))
                kept = round(kept / pruning.channel_multiple) * pruning.channel_multiple
                _remove_least(removed, here, scores, min(len(here) - kept, _spare("mlp", len(here), pruning)))
        miss = abs(budget - int(groups.parameters[removed].sum()))
        if best is None or miss < best[0]:
            best = miss, removed
        if rest >= 0 and miss <= sum(int(groups.parameters[m[0]]) for m in channels):
            return removed
    assert best is not None
    return best[1]


def _remove_least(removed: Mask, here: Mask, scores: Mask, count: int) -> None:
    removed[here[np.argsort(scores[here], kind="stable")[: max(0, count)]]] = True
