"""What leaves a model: its groups by a plan, and the tokens that are given; and the model without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tailored_llama.config import PlanConfig, Reconstruction
from tailored_llama.errors import InputError
from tailored_llama.models import LAYERED_PREFIX, Layer, all_tensor_shapes, read_config, read_structure
from tailored_llama.pruning.depth import Target, choose_layers, fixed_parameters, read_influence
from tailored_llama.pruning.groups import KINDS, Array, Groups, Stays, read_groups, read_slices, staying
from tailored_llama.pruning.importance import read_importance
from tailored_llama.pruning.plan import plan
from tailored_llama.pruning.surgery import kept_layers, prune_checkpoint
from tailored_llama.pruning.vocabulary import VocabularyPlan


@dataclass(frozen=True)
class Folders:
    """What a cut is planned from: the model, the model before the first step, its groups, and their importance.

    Without importance, a plan has the right numbers of groups, but not the right groups.
    """

    model: Path
    original: Path
    groups: Path
    importance: Path | None = None


@dataclass(frozen=True)
class Cut:
    """What stays of a model: groups, bool [groups]; the indices of each parameter; layers; and tokens (None: all)."""

    model: Path
    groups: Groups
    kept: Array
    stays: Stays
    layers: tuple[Layer, ...]
    tokens: VocabularyPlan | None

    @property
    def whole(self) -> bool:
        """Whether all groups stay."""
        return bool(self.kept.all())

    def write(self, out: Path, fitted: Sequence[Path] = ()) -> None:
        """Write the checkpoint; `fitted` are files of tensors in the place of the model's own."""
        prune_checkpoint(self.model, self.layers, self.stays, out, fitted, self.tokens)


def plan_cut(
    folders: Folders, ratio: float, pruning: PlanConfig, tokens: VocabularyPlan | None, method: Reconstruction = "none"
) -> Cut:
    """Plan what leaves, so that with the tokens the ratio is reached.

    Of the kind layer, whole layers leave first; none of their groups are kept.

    Args:
        ratio: the fraction of the original parameters that is gone afterwards.
        method: of reconstruction, which may add biases.

    Raises:
        InputError: as in `plan` and `choose_layers`; or the architecture has no biases for the method `bias`.
    """
    model, table = folders.model, read_groups(folders.groups)
    original = read_structure(folders.original).parameters
    groups, target = _count_parameters(model, table, ratio, method, original, tokens)
    scores = read_importance(folders.importance) if folders.importance else np.zeros(len(table))
    if "layer" in pruning.kinds:
        influence = read_influence(folders.importance) if folders.importance else None
        leave, parameters = choose_layers(groups, influence, target, pruning)
        kept = ~np.isin(groups.layer, leave)
        if set(pruning.kinds) & set(KINDS):
            rest = replace(target, gone=target.gone + parameters)
            kept[kept] = plan(groups.where(kept), scores[kept], rest, pruning)
    else:
        kept = plan(groups, scores, target, pruning)
    stays = staying(read_slices(folders.groups, all_tensor_shapes(model)), kept)
    return Cut(model, table, kept, stays, kept_layers(table, kept, read_structure(model).layers), tokens)


def _count_parameters(
    checkpoint: Path, groups: Groups, ratio: float, method: Reconstruction, total: int, tokens: VocabularyPlan | None
) -> tuple[Groups, Target]:
    """Groups and target of a plan, counting the tokens that leave and the biases that the method `bias` will add.

    Raises:
        InputError: the architecture has no biases to add.
    """
    structure = read_structure(checkpoint)
    gone = total - structure.parameters
    fixed = fixed_parameters(checkpoint, groups)
    if tokens:
        gone += (structure.size.vocab_size - len(tokens.kept)) * structure.size.row
    if method == "bias":
        config = read_config(checkpoint)
        if config["model_type"].removeprefix(LAYERED_PREFIX) != "llama":
            raise InputError(
                f"reconstruction.method: got 'bias'; allowed for {config['model_type']}: none, static or sequential "
                "(of the supported architectures, only llama can have biases on both output projections)"
            )
        missing = np.array([not config.get(name) for name in ("attention_bias", "mlp_bias")])
        share = np.array([layer.share for layer in structure.layers])[groups.layer]
        added = np.where(groups.kind == "attention", missing[0] * (share + 2) * structure.head_dim, missing[1] * 2)
        of_outputs = {block: int(missing[KINDS.index(block[1])]) * structure.hidden_size for block in fixed}
        gone -= int(added.sum()) + sum(of_outputs.values())
        fixed = {block: parameters + of_outputs[block] for block, parameters in fixed.items()}
        groups = replace(groups, parameters=groups.parameters + added)
    return groups, Target(total, ratio, gone, fixed)
