"""The plan: which groups each layer keeps, given their importance and a ratio of all parameters."""

from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import pyarrow as pa

from tailored_llama.config import PlanConfig
from tailored_llama.errors import InputError
from tailored_llama.pruning.groups import KINDS, Array, Groups

PLAN_SCHEMA = pa.schema(
    {"group": pa.int32(), "layer": pa.int16(), "kind": pa.string(), "index": pa.int32(), "kept": pa.bool_()}
)
TOLERANCE = 0.001  # fraction of all parameters by which a plan may miss its ratio


@dataclass(frozen=True, eq=False)
class _Block:
    """The groups of one layer and kind, all of the same size."""

    kind: str
    members: Array  # their indices
    size: int  # parameters of each
    spare: int  # how many may leave


def plan(groups: Groups, scores: Array, pruning: PlanConfig, total: int, ratio: float, gone: int = 0) -> Array:
    """Choose the groups that stay, bool [groups], by their scores, float [groups].

    So many leave that a ratio of the dense model's `total` parameters is gone, with the `gone` of the tokens. Where
    these are the ratio within 0.1 %, all groups stay.

    Raises:
        InputError: the ratio cannot be reached within 0.1 % of all parameters (in tiny models: within one channel). The
            message names the nearest or largest reachable ratio, and the settings that limit it.
    """
    budget = round(ratio * total) - gone
    if 0 <= budget <= TOLERANCE * total and gone:  # tokens reach the ratio alone
        return np.ones(len(groups), dtype=bool)
    blocks = _blocks(groups, pruning)
    multiple, kinds = pruning.channel_multiple, ", ".join(pruning.kinds)
    removable = sum(block.spare * block.size for block in blocks)
    if budget > removable:
        largest = np.floor((gone + removable) / total * 1e4) / 1e4
        raise InputError(
            f"pruning.ratios: got {ratio}; allowed: at most {largest:.4f} with protect_first "
            f"{pruning.protect_first}, protect_last {pruning.protect_last}, min_channels {pruning.min_channels}, "
            f"min_kv_heads {pruning.min_kv_heads}, channel_multiple {multiple} and kinds {kinds}"
        )
    remove = _remove_uniformly if pruning.shape == "stock" else _remove_globally
    removed = remove(blocks, scores, budget, multiple)
    reached = _parameters(blocks, removed)
    # The finest step is one channel, or one of every layer. It is above the tolerance only in tiny models.
    channels = [block.size for block in blocks if block.kind == "mlp"]
    grain = max(channels, default=0) * (len(channels) if pruning.shape == "stock" else 1)
    if abs(reached - budget) > max(TOLERANCE * total, grain):
        raise InputError(
            f"pruning.ratios: got {ratio}; allowed: {(gone + reached) / total:.4f}, the nearest that whole "
            f"groups reach with shape {pruning.shape}, kinds {kinds} and channel_multiple {multiple}"
        )
    return ~removed


def _blocks(groups: Groups, pruning: PlanConfig) -> list[_Block]:
    """The blocks that may be pruned. Each keeps its floor, which for channels is rounded up to a multiple."""
    inside = range(pruning.protect_first, int(groups.layer.max()) + 1 - pruning.protect_last)
    multiple = pruning.channel_multiple
    floors = {"attention": pruning.min_kv_heads, "mlp": -(-pruning.min_channels // multiple) * multiple}
    return [
        _Block(kind, members, size=int(groups.parameters[members[0]]), spare=max(0, len(members) - floors[kind]))
        for (layer, kind), members in groups.by_block().items()
        if layer in inside and kind in pruning.kinds
    ]


def _parameters(blocks: list[_Block], removed: Array) -> int:
    return sum(block.size * int(removed[block.members].sum()) for block in blocks)


def _remove_globally(blocks: list[_Block], scores: Array, budget: int, channel_multiple: int) -> Array:
    """Remove the groups of least importance per parameter over all layers and kinds, never more than the budget.

    With a channel multiple, as many channels leave together, a layer's least important ones first. The first to leave
    are the excess of its width over a multiple.
    """
    units: list[tuple[float, int, Array]] = []  # importance per parameter, parameters, and groups that leave together
    for block in blocks:
        multiple = channel_multiple if block.kind == "mlp" else 1
        order = block.members[np.argsort(scores[block.members], kind="stable")[: block.spare]]
        for unit in np.split(order, range(len(block.members) % multiple, len(order), multiple)):
            if size := len(unit) * block.size:
                units.append((scores[unit].sum() / size, size, unit))
    removed = np.zeros(len(scores), dtype=bool)
    for _, size, unit in sorted(units, key=itemgetter(0)):
        if size <= budget:
            removed[unit] = True
            budget -= size
    return removed


def _remove_uniformly(blocks: list[_Block], scores: Array, budget: int, multiple: int) -> Array:
    """Remove the same share of every layer: whole KV groups first, then channels for the rest of the budget.

    The number of KV groups is the one nearest to the common share for which the channels can make up the rest. Equal
    layers stay equal, so the budget is met to within one channel of every layer.
    """
    heads, channels = ([block for block in blocks if block.kind == kind] for kind in KINDS)
    pool = sum(len(block.members) * block.size for block in channels)
    share = budget / max(1, pool + sum(len(block.members) * block.size for block in heads))
    most = max((len(block.members) for block in heads), default=1)
    tried: list[tuple[int, Array]] = []  # by how much each missed the budget
    for step in sorted(range(most), key=lambda step: abs(step / most - share)):
        removed = np.zeros(len(scores), dtype=bool)
        for block in heads:
            _remove_least(removed, block, scores, round(step / most * len(block.members)))
        rest = budget - _parameters(blocks, removed)
        if rest > 0:
            for block in channels:
                width = len(block.members)
                kept = round((width - int(rest / pool * width)) / multiple) * multiple
                _remove_least(removed, block, scores, width - kept)
        miss = abs(budget - _parameters(blocks, removed))
        if rest >= 0 and miss <= sum(block.size for block in channels):
            return removed
        tried.append((miss, removed))
    return min(tried, key=itemgetter(0))[1]


def _remove_least(removed: Array, block: _Block, scores: Array, count: int) -> None:
    order = np.argsort(scores[block.members], kind="stable")
    removed[block.members[order[: max(0, min(count, block.spare))]]] = True
