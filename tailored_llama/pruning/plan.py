"""The plan: which groups leave. The same number leaves every layer, and of each layer its least important ones."""

from collections.abc import Callable
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


@dataclass(frozen=True)
class _Block:
    """The groups of one kind in a layer; all layers are alike."""

    width: int = 0  # how many there are
    size: int = 0  # parameters of one in every layer
    spare: int = 0  # how many may leave


def plan(
    groups: Groups, pruning: PlanConfig, total: int, ratio: float, gone: int, fits: Callable[[int], bool]
) -> dict[str, int]:
    """How many groups of each kind leave every layer.

    So many leave that a ratio of the dense model's `total` parameters is gone, with the `gone` of the tokens. Where
    these are the ratio within 0.1 %, all groups stay. A model can have so many KV heads as `fits` allows.

    Raises:
        InputError: the ratio cannot be reached within 0.1 % of all parameters (in tiny models: within one channel of
            every layer). The message names the nearest or largest reachable ratio, and the settings that limit it.
    """
    budget = round(ratio * total) - gone
    if 0 <= budget <= TOLERANCE * total and gone:  # tokens reach the ratio alone
        return dict.fromkeys(KINDS, 0)
    heads, channels = (_block(groups, kind, pruning) for kind in KINDS)
    multiple, kinds = pruning.channel_multiple, ", ".join(pruning.kinds)
    removable = heads.spare * heads.size + channels.spare * channels.size
    if budget > removable:
        largest = np.floor((gone + removable) / total * 1e4) / 1e4
        if not len(groups) and "vocabulary" not in pruning.kinds:
            raise InputError(f"pruning.kinds: got {kinds}; allowed: with vocabulary, as only tokens leave this model")
        floors = f"min_channels {pruning.min_channels}, min_kv_heads {pruning.min_kv_heads}"
        limits = f"{floors}, channel_multiple {multiple} and kinds {kinds}" if len(groups) else "tokens alone"
        raise InputError(f"pruning.ratios: got {ratio}; allowed: at most {largest:.4f} with {limits}")
    leaving = _split(heads, channels, budget, multiple, fits)
    reached = leaving[0] * heads.size + leaving[1] * channels.size
    if abs(reached - budget) > max(TOLERANCE * total, channels.size):
        raise InputError(
            f"pruning.ratios: got {ratio}; allowed: {(gone + reached) / total:.4f}, the nearest that whole "
            f"groups reach with kinds {kinds} and channel_multiple {multiple}"
        )
    return dict(zip(KINDS, leaving, strict=True))


def _block(groups: Groups, kind: str, pruning: PlanConfig) -> _Block:
    """What may leave of a kind. A layer keeps its floor, which for channels is rounded up to a multiple."""
    members = np.flatnonzero((groups.layer == 0) & (groups.kind == kind))
    if kind not in pruning.kinds or not len(members):
        return _Block()
    multiple, layers = pruning.channel_multiple, int(groups.layer.max()) + 1
    floors = {"attention": pruning.min_kv_heads, "mlp": -(-pruning.min_channels // multiple) * multiple}
    return _Block(len(members), layers * int(groups.parameters[members[0]]), max(0, len(members) - floors[kind]))


def _split(heads: _Block, channels: _Block, budget: int, multiple: int, fits: Callable[[int], bool]) -> tuple[int, int]:
    """How many KV heads and channels leave every layer: whole heads first, then channels for the rest of the budget.

    The number of KV heads is the one nearest to the common share for which the channels can make up the rest.
    """
    pool, width = channels.width * channels.size, channels.width
    share, most = budget / max(1, pool + heads.width * heads.size), max(1, heads.width)
    tried: list[tuple[int, tuple[int, int]]] = []  # by how much each missed the budget
    for step in sorted(range(most), key=lambda step: abs(step / most - share)):
        out, narrower = min(step, heads.spare), 0
        if out and not fits(heads.width - out):
            continue
        rest = budget - out * heads.size
        if rest > 0 and pool:
            kept = round((width - int(rest / pool * width)) / multiple) * multiple
            narrower = max(0, min(width - kept, channels.spare))
        miss = abs(rest - narrower * channels.size)
        if rest >= 0 and miss <= channels.size:
            return out, narrower
        tried.append((miss, (out, narrower)))
    return min(tried, key=itemgetter(0))[1]


def keep(groups: Groups, scores: Array, leaving: dict[str, int]) -> Array:
    """The groups that stay, bool [groups], if so many of each kind leave every layer: those of the lowest scores."""
    kept = np.ones(len(groups), dtype=bool)
    for kind, number in leaving.items():
        if number:
            members = np.flatnonzero(groups.kind == kind).reshape(groups.layer[-1] + 1, -1)  # all layers are alike
            least = np.argsort(scores[members], axis=1, kind="stable")[:, :number]
            kept[np.take_along_axis(members, least, 1)] = False
    return kept
