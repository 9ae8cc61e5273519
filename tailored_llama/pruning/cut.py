"""What leaves a model: its groups by a plan, and the tokens that are given; and the model without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailored_llama.config import PlanConfig
from tailored_llama.models import Layer, all_tensor_shapes, read_structure
from tailored_llama.pruning.groups import Array, Groups, Stays, read_groups, read_owners, staying
from tailored_llama.pruning.importance import read_importance
from tailored_llama.pruning.plan import Target, plan
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

    def write(self, out: Path, fitted: Sequence[Path] = ()) -> None:
        """Write the checkpoint; `fitted` are files of tensors in the place of the model's own."""
        prune_checkpoint(self.model, self.layers, self.stays, out, fitted, self.tokens)


def plan_cut(folders: Folders, ratio: float, pruning: PlanConfig, tokens: VocabularyPlan | None) -> Cut:
    """Plan what leaves, so that with the tokens a ratio of the original parameters is gone.

    Raises:
        InputError: as in `plan`.
    """
    model, groups, structure = folders.model, read_groups(folders.groups), read_structure(folders.model)
    original = read_structure(folders.original).parameters
    gone = original - structure.parameters
    if tokens:
        gone += (structure.size.vocab_size - len(tokens.kept)) * structure.size.row
    scores = read_importance(folders.importance) if folders.importance else np.zeros(len(groups))
    kept = plan(groups, scores, Target(original, ratio, gone), pruning)
    stays = staying(read_owners(folders.groups, all_tensor_shapes(model)), kept)
    return Cut(model, groups, kept, stays, kept_layers(groups, kept, structure.layers), tokens)
