"""The plan: which groups each layer keeps, from their importance and a ratio of all parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailored_llama.artifacts import read_table, write_table
from tailored_llama.checkpoints import read_config, read_structure, weights_digest
from tailored_llama.config import PruningConfig
from tailored_llama.errors import InputError
from tailored_llama.pruning.groups import Groups, read_groups
from tailored_llama.pruning.importance import read_importance
from tailored_llama.pruning.surgery import prune_checkpoint

PLAN_SCHEMA = pa.schema(
    {"group": pa.int32(), "layer": pa.int16(), "kind": pa.string(), "index": pa.int32(), "kept": pa.bool_()}
)
TOLERANCE = 0.001  # of all parameters: how far a plan may miss its ratio

Mask = np.ndarray[Any, Any]


def prune(
    dense: Path, groups_folder: Path, importance: Path, ratio: float, pruning: PruningConfig, out: Path
) -> dict[str, Any]:
    """Stage: write `plan.parquet` and the pruned checkpoint, both into one folder.

    Raises:
        InputError: the ratio cannot be reached; the largest one that can is named.
    """
    groups = read_groups(groups_folder)
    total = read_structure(dense).parameters
    kept = plan(groups, read_importance(importance), total, ratio, pruning)
    write_table(
        out / "plan.parquet",
        {"group": range(len(groups)), "layer": groups.layer, "kind": groups.kind, "index": groups.index, "kept": kept},
        PLAN_SCHEMA,
    )
    prune_checkpoint(dense, groups_folder, groups, kept, out)
    left = read_structure(out).parameters
    (out / "README.md").write_text(_card(dense, out, total, left, pruning))
    return {"parameters": left, "ratio": round(1 - left / total, 6)}


def _card(dense: Path, out: Path, total: int, left: int, pruning: PruningConfig) -> str:
    """The model card: what this is, from what, and how to load it."""
    kind = read_config(out)["model_type"]
    loading = (
        "Layers have different widths (`per_layer_config`): load it with `import tailored_llama`, or with "
        "`trust_remote_code=True` where that library is not installed."
        if kind == "tailored_llama"
        else f"All layers are alike: stock transformers loads it as `{kind}`."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# A structurally pruned language model

{left:,} of {total:,} parameters are left ({1 - left / total:.2%} removed, embeddings counted). Whole attention groups
and MLP channels were removed (allocation {pruning.allocation}; {", ".join(pruning.kinds)}; `plan.parquet` lists them);
the hidden width, embeddings and norms were not touched. The model has not been tuned since.

Pruned from the checkpoint whose weights have SHA-256 `{weights_digest(dense)}`. Its licence applies to this one too.

{loading}
"""


def read_plan(folder: Path) -> pa.Table:
    """`plan.parquet` as a table."""
    return read_table(folder / "plan.parquet", PLAN_SCHEMA)


def plan(groups: Groups, scores: Mask, total: int, ratio: float, pruning: PruningConfig) -> Mask:
    """Which groups stay, bool [groups].

    Args:
        groups: the coupled groups of the dense model.
        scores: their importance, float [groups].
        total: parameters of the dense model.
        ratio: fraction of `total` to remove.
        pruning: allocation, kinds, protected layers and floors.

    Raises:
        InputError: `ratio` cannot be reached within 0.1 % of all parameters (in tiny models: within one channel).
    """
    check_ratio(groups, total, ratio, pruning)
    budget = round(ratio * total)
    if pruning.allocation == "global":
        removed = _remove_globally(groups, scores, budget, pruning)
    else:
        removed = _remove_uniformly(groups, scores, budget, pruning)
    reached = int(groups.parameters[removed].sum())
    if abs(reached - ratio * total) > max(TOLERANCE * total, _grain(groups, pruning)):
        raise InputError(
            f"pruning.ratios: got {ratio}; allowed: {reached / total:.4f}, the nearest that whole groups reach with "
            f"allocation {pruning.allocation} and kinds {', '.join(pruning.kinds)}"
        )
    return ~removed


def _grain(groups: Groups, pruning: PruningConfig) -> int:
    """Parameters of the finest step, one channel (or one of every layer): above the tolerance in tiny models only."""
    channels = _candidates(groups, pruning) & (groups.kind == "mlp")
    if not channels.any():
        return 0
    layers = len(np.unique(groups.layer[channels])) if pruning.allocation == "uniform" else 1
    return layers * int(groups.parameters[channels].max())


def check_ratio(groups: Groups, total: int, ratio: float, pruning: PruningConfig) -> None:
    """Check that protected layers and floors leave enough to remove.

    Raises:
        InputError: they do not; the largest reachable ratio is named.
    """
    removable = 0
    for number in np.unique(groups.layer):
        for kind in ("attention", "mlp"):
            here = np.flatnonzero(_candidates(groups, pruning) & (groups.layer == number) & (groups.kind == kind))
            spare = max(0, len(here) - _floor(kind, pruning))
            removable += int(np.sort(groups.parameters[here])[:spare].sum()) if spare else 0
    if round(ratio * total) > removable:
        raise InputError(
            f"pruning.ratios: got {ratio}; allowed: at most {np.floor(removable / total * 1e4) / 1e4:.4f} with "
            f"protect_first {pruning.protect_first}, protect_last {pruning.protect_last}, min_channels "
            f"{pruning.min_channels} and kinds {', '.join(pruning.kinds)}"
        )


def _candidates(groups: Groups, pruning: PruningConfig) -> Mask:
    """Groups of the kinds and layers that may lose some."""
    last = int(groups.layer.max()) + 1 - pruning.protect_last
    inside = (groups.layer >= pruning.protect_first) & (groups.layer < last)
    return np.asarray(inside & np.isin(groups.kind, pruning.kinds))


def _floor(kind: str, pruning: PruningConfig) -> int:
    """Groups that every layer keeps."""
    return 1 if kind == "attention" else pruning.min_channels


def _remove_globally(groups: Groups, scores: Mask, budget: int, pruning: PruningConfig) -> Mask:
    """Remove by least importance per parameter, over all layers and kinds, never more than the budget."""
    removed = np.zeros(len(groups), dtype=bool)
    candidates = np.flatnonzero(_candidates(groups, pruning))
    order = candidates[np.argsort(scores[candidates] / groups.parameters[candidates], kind="stable")]
    spare: dict[tuple[int, str], int] = {}
    for layer, kind in zip(groups.layer, groups.kind, strict=True):
        spare[layer, kind] = spare.get((layer, kind), -_floor(kind, pruning)) + 1
    for group in order:
        where = groups.layer[group], groups.kind[group]
        if groups.parameters[group] <= budget and spare[where] > 0:
            removed[group] = True
            budget -= int(groups.parameters[group])
            spare[where] -= 1
    return removed


def _remove_uniformly(groups: Groups, scores: Mask, budget: int, pruning: PruningConfig) -> Mask:
    """Remove the same share of every layer: whole KV groups first, channels for the rest of the budget.

    Of all numbers of KV groups the one nearest to the common share is taken for which the channels can make up the
    rest. Equal layers stay equal, so the budget is met to within one channel of every layer.
    """
    candidates = _candidates(groups, pruning)
    share = budget / max(1, int(groups.parameters[candidates].sum()))
    members = {
        (int(layer), kind): np.flatnonzero(candidates & (groups.layer == layer) & (groups.kind == kind))
        for layer in np.unique(groups.layer[candidates])
        for kind in pruning.kinds
    }
    most = max((len(m) for (_, kind), m in members.items() if kind == "attention"), default=1)
    best: tuple[int, Mask] | None = None
    for step in sorted(range(most), key=lambda step: abs(step / most - share)):
        removed = np.zeros(len(groups), dtype=bool)
        for (_, kind), group in members.items():
            if kind == "attention":
                _remove_least(removed, group, scores, round(step / most * len(group)), _floor(kind, pruning))
        rest = budget - int(groups.parameters[removed].sum())
        channels = {key: m for key, m in members.items() if key[1] == "mlp"}
        pool = sum(int(groups.parameters[m].sum()) for m in channels.values())
        if rest > 0 and pool:
            for group in channels.values():
                count = int(rest / pool * len(group))
                _remove_least(removed, group, scores, count, pruning.min_channels)
        miss = abs(budget - int(groups.parameters[removed].sum()))
        if best is None or miss < best[0]:
            best = miss, removed
        if rest >= 0 and miss <= sum(int(groups.parameters[m[0]]) for m in channels.values()):
            return removed
    assert best is not None
    return best[1]


def _remove_least(removed: Mask, group: Mask, scores: Mask, count: int, floor: int) -> None:
    count = max(0, min(count, len(group) - floor))
    removed[group[np.argsort(scores[group], kind="stable")[:count]]] = True
