"""The pruning stage: plan, reconstruct, cut, and write the model card."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from tailored_llama.config import PlanConfig, Reconstruction, Work
from tailored_llama.data import read_calibration
from tailored_llama.errors import InputError
from tailored_llama.models import (
    CARD,
    LAYERED_PREFIX,
    all_tensor_shapes,
    check_solver,
    open_model,
    pruned_card,
    read_config,
    read_structure,
)
from tailored_llama.pruning.depth import Target, choose_layers, fixed_parameters, read_influence
from tailored_llama.pruning.groups import KINDS, Array, Groups, Stays, read_groups, read_slices, staying
from tailored_llama.pruning.importance import read_importance
from tailored_llama.pruning.layerwise import Text
from tailored_llama.pruning.plan import PLAN_SCHEMA, plan
from tailored_llama.pruning.reconstruction import reconstruct
from tailored_llama.pruning.settings import PruneSettings
from tailored_llama.pruning.surgery import kept_layers, prune_checkpoint
from tailored_llama.pruning.vocabulary import VocabularyPlan, plan_vocabulary
from tailored_llama.store import write_table


def prune_model(
    model: Path,
    original: Path,
    groups: Path,
    importance: Path,
    calibration: Path | None,
    counts: Path | None,
    *,
    settings: PruneSettings,
    work: Work,
) -> dict[str, Any]:
    """Stage: write `plan.parquet` and the pruned checkpoint, both into one folder.

    Of the kind vocabulary, `vocabulary.parquet` says which tokens stay. They count towards the ratio first, and leave
    last: reconstruction reads the dense model's tokens.

    Args:
        model: the model to prune.
        original: the model before the first step, whose parameters the ratio is of.
        groups: the output of `build_graph` for `model`.
        importance: the output of `score_importance` for it.
        calibration: the text that reconstruction is fitted to; the method `none` does not read it.
        counts: the output of `count_tokens` for it, for the kind vocabulary.

    Raises:
        InputError: the ratio cannot be reached (the message names the largest or nearest that can), or the
            architecture has no biases for the method `bias`; or the fits need more memory than the device has free.
    """
    structure, before, table = read_structure(model), read_structure(original).size, read_groups(groups)
    method = settings.reconstruction.method
    check_solver(structure, method, work.execution.device)
    tokens = plan_vocabulary(model, counts, settings.ratio, settings.plan, before.parameters) if counts else None
    influence = read_influence(importance) if "layer" in settings.plan.kinds else None
    counted, target = count_parameters(model, table, settings.ratio, method, before.parameters, tokens)
    kept = plan_kept(counted, read_importance(importance), target, settings.plan, influence)
    columns = {"layer": table.layer, "kind": table.kind, "index": table.index, "kept": kept}
    write_table(work.out / "plan.parquet", {"group": range(len(table))} | columns, PLAN_SCHEMA)
    stays = staying(read_slices(groups, all_tensor_shapes(model)), kept)
    with tempfile.TemporaryDirectory(dir=work.out) as scratch:
        fitted = _fit(model, calibration, stays, Path(scratch), settings, work)
        prune_checkpoint(model, kept_layers(table, kept, structure.layers), stays, work.out, fitted, tokens)
    after = read_structure(work.out)
    card = pruned_card(model, work.out, before, after.size, settings.plan, settings.reconstruction)
    (work.out / CARD).write_text(card, encoding="utf-8")
    facts: dict[str, Any] = {"parameters": after.size.parameters}
    facts["ratio"] = round(1 - after.size.parameters / before.parameters, 6)
    facts["body_ratio"] = round(1 - after.size.body / before.body, 6)
    facts |= {"layers": len(after.layers)} if len(after.layers) < len(structure.layers) else {}
    return facts | ({"tokens": after.size.vocab_size, "tokens_whole": round(tokens.whole, 6)} if tokens else {})


def _fit(
    checkpoint: Path, calibration: Path | None, stays: Stays, scratch: Path, settings: PruneSettings, work: Work
) -> list[Path]:
    """Reconstruct what stays; returns the files of the fitted tensors."""
    if settings.reconstruction.method == "none":
        return []
    assert calibration is not None
    model = open_model(checkpoint, work.execution, scratch)
    text = Text(read_calibration(calibration), work.execution.batch_tokens)
    fitted: list[Path] = []
    for tensors in reconstruct(model, text, stays, settings.reconstruction, work.progress):
        if tensors:  # none of a layer that leaves
            fitted.append(scratch / f"{len(fitted)}.safetensors")
            save_file(tensors, fitted[-1])
    return fitted


def check_ratio(
    dense: Path, groups: Path, counts: Path | None, *, settings: PruneSettings, work: Work
) -> dict[str, int]:
    """Stage: check that a ratio can be reached, before anything expensive; write `reach.json`.

    The plan that it makes has no importances yet. What counts is how many groups of each kind and tokens stay.

    Raises:
        InputError: as in `plan_kept`, `plan_vocabulary` and `count_parameters`.
    """
    table, ratio = read_groups(groups), settings.ratio
    tokens = plan_vocabulary(dense, counts, ratio, settings.plan) if counts else None
    counted, target = count_parameters(dense, table, ratio, settings.reconstruction.method, None, tokens)
    kept = plan_kept(counted, np.zeros(len(table)), target, settings.plan)
    stay = {kind: int(kept[table.kind == kind].sum()) for kind in KINDS}
    stay |= {"tokens": len(tokens.kept)} if tokens else {}
    (work.out / "reach.json").write_text(json.dumps(stay) + "\n")
    return stay


def plan_kept(
    groups: Groups, scores: Array, target: Target, pruning: PlanConfig, influence: Array | None = None
) -> Array:
    """Plan as `plan` does. Of the kind layer, whole layers leave first; none of their groups are kept.

    Raises:
        InputError: as in `plan` and `choose_layers`.
    """
    if "layer" not in pruning.kinds:
        return plan(groups, scores, target, pruning)
    leave, parameters = choose_layers(groups, influence, target, pruning)
    kept = ~np.isin(groups.layer, leave)
    if set(pruning.kinds) & set(KINDS):
        rest = replace(target, gone=target.gone + parameters)
        kept[kept] = plan(groups.where(kept), scores[kept], rest, pruning)
    return kept


def count_parameters(
    checkpoint: Path,
    groups: Groups,
    ratio: float,
    method: Reconstruction,
    original_parameters: int | None = None,
    tokens: VocabularyPlan | None = None,
) -> tuple[Groups, Target]:
    """Groups and target of a plan, counting the tokens that leave and the biases that the method `bias` will add.

    Raises:
        InputError: the architecture has no biases to add.
    """
    structure = read_structure(checkpoint)
    total = original_parameters or structure.parameters
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
