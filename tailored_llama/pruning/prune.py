"""The pruning stage: plan, reconstruct, cut, and write the model card."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from tailored_llama.config import ExecutionConfig, PruningConfig, Reconstruction, ReconstructionConfig, RunConfig
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
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Groups, read_groups, read_slices
from tailored_llama.pruning.importance import read_importance
from tailored_llama.pruning.plan import PLAN_SCHEMA, Mask, plan
from tailored_llama.pruning.reconstruction import reconstruct
from tailored_llama.pruning.surgery import prune_checkpoint
from tailored_llama.store import write_table

STAGE, VERSION = "pruned", 3


def key_fields(config: RunConfig, ratio: float, original_parameters: int) -> dict[str, Any]:
    """What a pruned checkpoint depends on, beside the checkpoint, its groups, their importance and the text."""
    method = config.reconstruction.method
    fields = config.pruning.model_dump(mode="json", exclude={"ratios"})
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
    original_parameters: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: write `plan.parquet` and the pruned checkpoint, both into one folder.

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
        original_parameters: of the model before the first step, if `checkpoint` has been pruned already.
        progress: called after every reconstructed layer.

    Raises:
        InputError: the ratio cannot be reached (the message names the largest or nearest that can), or the
            architecture has no biases for the method `bias`; or the fits need more memory than the device has free.
    """
    method = reconstruction.method
    check_solver(read_structure(checkpoint), method, execution.device)
    table = read_groups(groups)
    kept = plan_kept(checkpoint, table, read_importance(importance), ratio, pruning, method, original_parameters)
    write_table(
        out / "plan.parquet",
        {"group": range(len(table)), "layer": table.layer, "kind": table.kind, "index": table.index, "kept": kept},
        PLAN_SCHEMA,
    )
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        fitted: list[Path] = []
        if method != "none":
            assert calibration is not None
            slices = read_slices(groups, all_tensor_shapes(checkpoint))
            model = open_model(checkpoint, execution, Path(scratch))
            sequences = read_calibration(calibration)
            ridge, tokens = reconstruction.ridge, execution.batch_tokens
            for tensors in reconstruct(model, sequences, slices, kept, method, ridge, progress, tokens):
                fitted.append(Path(scratch) / f"{len(fitted)}.safetensors")
                save_file(tensors, fitted[-1])
            del model
        prune_checkpoint(checkpoint, groups, table, kept, out, fitted)
    total = original_parameters or read_structure(checkpoint).parameters
    left = read_structure(out).parameters
    (out / CARD).write_text(pruned_card(checkpoint, out, total, left, pruning, reconstruction), encoding="utf-8")
    return {"parameters": left, "ratio": round(1 - left / total, 6)}


def plan_kept(
    checkpoint: Path,
    groups: Groups,
    scores: Mask,
    ratio: float,
    pruning: PruningConfig,
    method: Reconstruction,
    original_parameters: int | None = None,
) -> Mask:
    """Plan a checkpoint as `plan` does, counting the biases that the method `bias` will add.

    Raises:
        InputError: as in `plan`, or the architecture has no biases to add.
    """
    structure = read_structure(checkpoint)
    total = original_parameters or structure.parameters
    gone = total - structure.parameters
    if method == "bias":
        config = read_config(checkpoint)
        if config["model_type"].removeprefix(LAYERED_PREFIX) != "llama":
            raise InputError(
                f"reconstruction.method: got 'bias'; allowed for {config['model_type']}: none, static or sequential "
                "(of the supported architectures, only llama can have biases on both output projections)"
            )
        missing = np.array([not config.get(name) for name in ("attention_bias", "mlp_bias")])
        share = np.array([layer.heads // layer.kv_heads for layer in structure.layers])[groups.layer]
        added = np.where(groups.kind == "attention", missing[0] * (share + 2) * structure.head_dim, missing[1] * 2)
        gone -= int(added.sum()) + len(structure.layers) * int(missing.sum()) * structure.hidden_size
        groups = replace(groups, parameters=groups.parameters + added)
    return plan(groups, scores, total, ratio, pruning, gone)
