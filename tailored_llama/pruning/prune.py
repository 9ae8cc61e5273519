"""The pruning stage: plan, reconstruct, cut, and write the model card."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from tailored_llama.config import (
    ExecutionConfig,
    PruningConfig,
    Reconstruction,
    ReconstructionConfig,
    RunConfig,
    trims_vocabulary,
)
from tailored_llama.data import read_calibration
from tailored_llama.errors import InputError
from tailored_llama.models import (
    CARD,
    LAYERED_PREFIX,
    Size,
    all_tensor_shapes,
    check_solver,
    open_model,
    pruned_card,
    read_config,
    read_structure,
)
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.depth import Array, Target, choose_layers, fixed_parameters, read_influence
from tailored_llama.pruning.groups import KINDS, Groups, read_groups, read_slices, staying
from tailored_llama.pruning.importance import read_importance
from tailored_llama.pruning.layerwise import Text
from tailored_llama.pruning.plan import PLAN_SCHEMA, Mask, Widths, plan, read_widths
from tailored_llama.pruning.reconstruction import reconstruct
from tailored_llama.pruning.surgery import kept_layers, prune_checkpoint
from tailored_llama.pruning.vocabulary import VocabularyPlan, plan_vocabulary
from tailored_llama.store import write_table

STAGE, VERSION = "pruned", 3


def key_fields(config: RunConfig, ratio: float, original_parameters: int) -> dict[str, Any]:
    """What a pruned checkpoint depends on, beside the checkpoint, its groups, their importance, text and counts."""
    method = config.reconstruction.method
    unread = {"ratios"} if trims_vocabulary(config) else {"ratios", "vocabulary", "vocabulary_share"}
    unread |= {"vocabulary_share"} if config.pruning.vocabulary != "auto" else set()
    fields = config.pruning.model_dump(mode="json", exclude=unread | {"search_evaluations"})
    fields |= {"ratio": ratio, "original": original_parameters, "reconstruction": method}
    if method != "none":
        fields["ridge"] = config.reconstruction.ridge
    if method == "sequential":
        fields["fitted"] = "every projection"  # artifacts without it: o_proj and down_proj alone
    return fields


def prune(
    checkpoint: Path,
    groups: Path,
    importance: Path,
    calibration: Path | None,
    *,
    ratio: float,
    pruning: PruningConfig,
    reconstruction: ReconstructionConfig,
    out: Path,
    execution: ExecutionConfig,
    counts: Path | None = None,
    allocation: Path | None = None,
    original: Size | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: write `plan.parquet` and the pruned checkpoint, both into one folder.

    Of the kind vocabulary, `vocabulary.parquet` says which tokens stay. They count towards the ratio first, and leave
    last: reconstruction reads the dense model's tokens.

    Args:
        checkpoint: the model to prune.
        groups: the output of `build_graph` for it.
        importance: the output of `score_importance` for it.
        calibration: the text that reconstruction is fitted to; the method `none` does not read it.
        ratio: fraction of the original parameters that are gone after this step.
        pruning: allocation, kinds, protected layers, floors, multiple.
        reconstruction: method and ridge.
        out: an existing folder.
        execution: the device of reconstruction, which models are streamed, and the tokens per pass.
        counts: the output of `count_tokens` for it, if `pruning` has the kind vocabulary.
        allocation: the output of `search_widths` for it and this ratio, if `pruning` has the allocation search.
        original: the size of the model before the first step, if `checkpoint` has been pruned already.
        progress: called after every reconstructed layer.

    Raises:
        InputError: the ratio cannot be reached (the message names the largest or nearest that can), or the
            architecture has no biases for the method `bias`; or the fits need more memory than the device has free.
    """
    method = reconstruction.method
    structure = read_structure(checkpoint)
    check_solver(structure, method, execution.device)
    table, before = read_groups(groups), original or structure.size
    total = before.parameters
    tokens = plan_vocabulary(checkpoint, counts, ratio, pruning, total) if counts else None
    influence = read_influence(importance) if "layer" in pruning.kinds else None
    widths = read_widths(allocation) if allocation else None
    counted, target = count_parameters(checkpoint, table, ratio, method, total, tokens)
    kept = plan_kept(counted, read_importance(importance), target, pruning, influence, widths)
    write_table(
        out / "plan.parquet",
        {"group": range(len(table)), "layer": table.layer, "kind": table.kind, "index": table.index, "kept": kept},
        PLAN_SCHEMA,
    )
    stays = staying(read_slices(groups, all_tensor_shapes(checkpoint)), kept)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        fitted: list[Path] = []
        if method != "none":
            assert calibration is not None
            model = open_model(checkpoint, execution, Path(scratch))
            text = Text(read_calibration(calibration), execution.batch_tokens)
            for tensors in reconstruct(model, text, stays, reconstruction, progress):
                if tensors:  # none of a layer that leaves
                    fitted.append(Path(scratch) / f"{len(fitted)}.safetensors")
                    save_file(tensors, fitted[-1])
            del model
        prune_checkpoint(checkpoint, kept_layers(table, kept, structure.layers), stays, out, fitted, tokens)
    left, layers = read_structure(out).size, len(read_structure(out).layers)
    (out / CARD).write_text(pruned_card(checkpoint, out, before, left, pruning, reconstruction), encoding="utf-8")
    facts = {"parameters": left.parameters, "ratio": round(1 - left.parameters / total, 6)}
    facts |= {"body_ratio": round(1 - left.body / before.body, 6)}
    facts |= {"layers": layers} if layers < len(structure.layers) else {}
    return facts | ({"tokens": left.vocab_size, "tokens_whole": round(tokens.whole, 6)} if tokens else {})


def check_ratio(checkpoint: Path, groups: Path, counts: Path | None, ratio: float, config: RunConfig) -> None:
    """Check that a ratio can be reached, before anything else is known of the model than its groups.

    Raises:
        InputError: as in `plan_kept`, `plan_vocabulary` and `count_parameters`.
    """
    table, pruning = read_groups(groups), config.pruning
    tokens = plan_vocabulary(checkpoint, counts, ratio, pruning) if counts else None
    counted, target = count_parameters(checkpoint, table, ratio, config.reconstruction.method, None, tokens)
    plan_kept(counted, np.zeros(len(table)), target, pruning)


def plan_kept(
    groups: Groups,
    scores: Mask,
    target: Target,
    pruning: PruningConfig,
    influence: Array | None = None,
    widths: Widths | None = None,
) -> Mask:
    """Plan as `plan` does. Of the kind layer, whole layers leave first; none of their groups are kept.

    Raises:
        InputError: as in `plan` and `choose_layers`.
    """
    if "layer" not in pruning.kinds:
        return plan(groups, scores, target, pruning, widths)
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
