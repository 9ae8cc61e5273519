"""The pruning stage: plan, reconstruct, cut, and say what was done."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from tailored_llama.artifacts import write_table
from tailored_llama.calibration import read_calibration
from tailored_llama.cards import CARD, pruned_card
from tailored_llama.checkpoints import (
    LAYERED_PREFIX,
    read_config,
    read_structure,
    tensor_shapes,
    weight_files,
)
from tailored_llama.config import PruningConfig, Reconstruction, ReconstructionConfig
from tailored_llama.errors import InputError
from tailored_llama.models import load
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Groups, read_groups, read_slices
from tailored_llama.pruning.importance import read_importance
from tailored_llama.pruning.plan import PLAN_SCHEMA, Mask, plan
from tailored_llama.pruning.reconstruction import reconstruct
from tailored_llama.pruning.surgery import prune_checkpoint


def prune(
    dense: Path,
    groups_folder: Path,
    importance: Path,
    ratio: float,
    pruning: PruningConfig,
    reconstruction: ReconstructionConfig,
    calibration: Path | None,
    out: Path,
    original: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
    batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Stage: write `plan.parquet` and the pruned checkpoint, both into one folder.

    Args:
        dense: the checkpoint to prune.
        groups_folder: its groups artifact.
        importance: its importance artifact.
        ratio: fraction of the original parameters that are gone afterwards.
        pruning: allocation, kinds, protected layers, floors, multiple.
        reconstruction: method and ridge.
        calibration: the calibration artifact that reconstruction is fitted to; `none` reads none.
        out: an existing folder.
        original: parameters before the first step, where `dense` has been pruned already.
        device: where reconstruction is computed.
        progress: told of every layer reconstructed.
        batch_tokens: of the calibration text in a pass of reconstruction at most; absent: 4,096.

    Raises:
        InputError: the ratio cannot be reached, and the largest or nearest one that can is named; or the architecture
            has no biases for the method `bias`.
    """
    method = reconstruction.method
    groups = read_groups(groups_folder)
    kept = plan_kept(dense, groups, read_importance(importance), ratio, pruning, method, original)
    write_table(
        out / "plan.parquet",
        {"group": range(len(groups)), "layer": groups.layer, "kind": groups.kind, "index": groups.index, "kept": kept},
        PLAN_SCHEMA,
    )
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        fitted: list[Path] = []
        if method != "none":
            assert calibration is not None
            shapes = {name: shape for file in weight_files(dense) for name, shape in tensor_shapes(file).items()}
            slices, model = read_slices(groups_folder, shapes), load(dense, device=device)
            sequences = read_calibration(calibration)
            ridge = reconstruction.ridge
            for tensors in reconstruct(model, sequences, slices, kept, method, ridge, progress, batch_tokens):
                fitted.append(Path(scratch) / f"{len(fitted)}.safetensors")
                save_file(tensors, fitted[-1])
            del model
        prune_checkpoint(dense, groups_folder, groups, kept, out, fitted)
    total, left = original or read_structure(dense).parameters, read_structure(out).parameters
    (out / CARD).write_text(pruned_card(dense, out, total, left, pruning, reconstruction), encoding="utf-8")
    return {"parameters": left, "ratio": round(1 - left / total, 6)}


def plan_kept(
    dense: Path,
    groups: Groups,
    scores: Mask,
    ratio: float,
    pruning: PruningConfig,
    method: Reconstruction,
    original: int | None = None,
) -> Mask:
    """The plan of a checkpoint, as `plan`; biases that the method `bias` will add are counted.

    Raises:
        InputError: as `plan`; or the architecture has no biases to add.
    """
    structure = read_structure(dense)
    total = original or structure.parameters
    gone = total - structure.parameters
    if method == "bias":
        config = read_config(dense)
        if config["model_type"].removeprefix(LAYERED_PREFIX) != "llama":
            raise InputError(
                f"reconstruction.method: got 'bias'; allowed for {config['model_type']}: none, static or sequential "
                "(of the supported architectures, llama alone can have biases on both output projections)"
            )
        here = np.array([not config.get(name) for name in ("attention_bias", "mlp_bias")])
        share = np.array([layer.heads // layer.kv_heads for layer in structure.layers])[groups.layer]
        added = np.where(groups.kind == "attention", here[0] * (share + 2) * structure.head_dim, here[1] * 2)
        gone -= int(added.sum()) + len(structure.layers) * int(here.sum()) * structure.hidden_size
        groups = replace(groups, parameters=groups.parameters + added)
    return plan(groups, scores, total, ratio, pruning, gone)


def step_ratios(ratio: float, steps: int) -> list[float]:
    """The fractions of the original parameters that are gone after each of some equal steps."""
    return [ratio * step / steps for step in range(1, steps + 1)]
