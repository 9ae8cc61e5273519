"""Importance: one float per coupled group; higher means keep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from tailored_llama.artifacts import read_table, write_table
from tailored_llama.calibration import read_calibration
from tailored_llama.checkpoints import tensor_shapes, weight_files
from tailored_llama.config import Criterion
from tailored_llama.models import load
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Groups, Slices, read_groups, read_slices

IMPORTANCE_SCHEMA = pa.schema(
    {
        "group": pa.int32(),
        "layer": pa.int16(),
        "kind": pa.string(),
        "criterion": pa.string(),
        "score": pa.float64(),
    }
)

Reduce = Callable[[Tensor, int], Tensor]  # a parameter-shaped tensor, a dimension → one value per index of it


def score_importance(
    dense: Path,
    calibration: Path | None,
    groups_folder: Path,
    criterion: Criterion,
    seed: int,
    out: Path,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: write `importance.parquet`, one score per coupled group.

    Args:
        dense: the dense checkpoint.
        calibration: the calibration artifact; only the Taylor criteria read it.
        groups_folder: the groups artifact.
        criterion: see `taylor_scores`, `magnitude_scores`; `random` draws uniformly by `seed`.
        seed: of the random criterion.
        out: an existing folder.
        device: where gradients are computed.
        progress: told of every calibration sequence done.
    """
    groups = read_groups(groups_folder)
    shapes = {name: shape for file in weight_files(dense) for name, shape in tensor_shapes(file).items()}
    slices = read_slices(groups_folder, shapes)
    if criterion == "random":
        scores = np.random.default_rng(seed).random(len(groups))
    elif criterion in ("magnitude_l1", "magnitude_l2"):
        scores = magnitude_scores(dense, slices, len(groups), criterion)
    else:
        assert calibration is not None
        model = load(dense, device=device)
        scores = taylor_scores(model, read_calibration(calibration), slices, len(groups), criterion, progress)
    write_importance(out, groups, scores, criterion)
    return {}


def write_importance(out: Path, groups: Groups, scores: np.ndarray[Any, Any], criterion: str) -> None:
    """Write `importance.parquet`.

    Raises:
        FloatingPointError: a score is not a finite number.
    """
    if not np.isfinite(scores).all():
        first = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise FloatingPointError(
            f"importance of group {first} (layer {groups.layer[first]}, {groups.kind[first]}) is {scores[first]}"
        )
    columns = {"group": range(len(groups)), "layer": groups.layer, "kind": groups.kind, "score": scores}
    write_table(out / "importance.parquet", columns | {"criterion": [criterion] * len(groups)}, IMPORTANCE_SCHEMA)


def read_importance(folder: Path) -> np.ndarray[Any, Any]:
    """Scores of all groups, float64 [groups]."""
    return np.asarray(read_table(folder / "importance.parquet", IMPORTANCE_SCHEMA)["score"].to_numpy())


def magnitude_scores(dense: Path, slices: list[Slices], groups: int, criterion: Criterion) -> np.ndarray[Any, Any]:
    """Norm of all weights of each group: L1, or L2 (Euclidean); tensors are read one at a time."""
    scores = torch.zeros(groups, dtype=torch.float64)
    by_name = _by_parameter(slices)
    for file in weight_files(dense):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                for part in by_name.get(name, []):
                    weight = tensors.get_tensor(name).float()
                    values = weight.abs() if criterion == "magnitude_l1" else weight.square()
                    _add(scores, part, _sum_but(values, part.dim))
    return (scores if criterion == "magnitude_l1" else scores.sqrt()).numpy()


def taylor_scores(
    model: Any,
    input_ids: Tensor,
    slices: list[Slices],
    groups: int,
    criterion: Criterion,
    progress: Progress = silent,
) -> np.ndarray[Any, Any]:
    """Taylor importance by gradient of the language-modelling loss (LLM-Pruner, arXiv 2305.11627, section 3.2).

    With w a weight and g its gradient, a group's score is the sum over its members of

    * `taylor_first`: |w·g| of every element (equation 5, first term);
    * `taylor_vector`: |Σ w·g| over each row or column;
    * `taylor_second`: ½·w²·mean over samples of g², the diagonal of the empirical Fisher matrix.

    Every gradient is reduced to group scores as soon as it is complete, then freed, and activations are recomputed
    layer by layer: beside the weights, memory holds one layer's gradients, and the hidden states between layers of
    one sample (`taylor_second`) or of all samples (the other two, which need the gradient of their sum).

    Args:
        model: a causal LM; its gradient settings are changed.
        input_ids: int64 [samples, tokens].
        slices: which group owns which index of which parameter.
        groups: their number.
        criterion: one of the three.
        progress: told of every backward pass.
    """
    scores = torch.zeros(groups, dtype=torch.float64)
    by_name = _by_parameter(slices)
    per_sample = criterion == "taylor_second"
    batches = list(input_ids.split(1)) if per_sample else [input_ids]

    def reduce(weight: Tensor, gradient: Tensor, dim: int) -> Tensor:
        product = weight.detach().float() * gradient.float()
        if criterion == "taylor_second":
            return _sum_but(product.square(), dim) / (2 * len(input_ids))
        if criterion == "taylor_vector":
            return _sum_but(product, dim).abs()
        return _sum_but(product.abs(), dim)

    def on_gradient(parts: list[Slices]) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            for part in parts:
                _add(scores, part, reduce(parameter, parameter.grad, part.dim))
            parameter.grad = None

        return hook

    handles = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in by_name)
        if name in by_name:
            handles.append(parameter.register_post_accumulate_grad_hook(on_gradient(by_name[name])))
    model.train()  # gradient checkpointing acts in training mode only
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        for done, batch in enumerate(batches):
            _loss(model, batch.to(model.device)).backward()
            progress(done + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()
        model.activation_checkpointing_disable()
        model.requires_grad_(False).eval()
    return scores.numpy()


def _loss(model: Any, input_ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy; logits exist for one sequence at a time, forward and backward."""
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state

    def sequence_loss(states: Tensor, ids: Tensor) -> Tensor:
        return cross_entropy(model.lm_head(states[:-1]).float(), ids[1:])

    losses = [checkpoint(sequence_loss, h, ids, use_reentrant=False) for h, ids in zip(hidden, input_ids, strict=True)]
    return torch.stack(losses).mean()


def _by_parameter(slices: list[Slices]) -> dict[str, list[Slices]]:
    found: dict[str, list[Slices]] = defaultdict(list)
    for part in slices:
        found[part.parameter].append(part)
    return dict(found)


def _sum_but(values: Tensor, dim: int) -> Tensor:
    """Sum over every dimension but one."""
    others = [d for d in range(values.dim()) if d != dim]
    return values.sum(others) if others else values


def _add(scores: Tensor, part: Slices, values: Tensor) -> None:
    """Add one value per index of a dimension to the group that owns the index."""
    owned = torch.from_numpy(np.flatnonzero(part.owner >= 0))
    scores.index_add_(0, torch.from_numpy(part.owner)[owned], values.to("cpu", torch.float64)[owned])
