"""Importance: one score per coupled group; a higher score means keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from tailored_llama.config import Work
from tailored_llama.data import read_calibration
from tailored_llama.models import all_tensor_shapes, open_model, tensor_reader, weight_files
from tailored_llama.pruning.groups import Array, Groups, Owners, add_scores, read_groups, read_owners, zero_scores
from tailored_llama.pruning.layerwise import Text
from tailored_llama.pruning.settings import ImportanceSettings
from tailored_llama.pruning.taylor import taylor_scores
from tailored_llama.store import read_table, write_table

IMPORTANCE_SCHEMA = pa.schema(
    {"group": pa.int32(), "layer": pa.int16(), "kind": pa.string(), "criterion": pa.string(), "score": pa.float64()}
)


def score_importance(
    dense: Path, groups: Path, calibration: Path | None, *, settings: ImportanceSettings, work: Work
) -> None:
    """Stage: write `importance.parquet`, one score per coupled group.

    The criteria are those of `taylor_scores` and `magnitude_scores`; `random` draws uniformly. All but those of
    `config.DATA_FREE` read the calibration.
    """
    table, owners = read_groups(groups), read_owners(groups, all_tensor_shapes(dense))
    criterion, out = settings.criterion, work.out
    if criterion == "random":
        scores = np.random.default_rng(settings.seed).random(len(table))
    elif criterion == "magnitude_l2":
        scores = magnitude_scores(dense, owners)
    else:
        assert calibration is not None
        model = open_model(dense, work.execution, out)
        text = Text(read_calibration(calibration), work.execution.batch_tokens)
        scores = taylor_scores(model, text, owners, criterion, work.progress, settings.seed or 0)
    write_importance(out, table, scores, criterion)


def write_importance(out: Path, groups: Groups, scores: Array, criterion: str) -> None:
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


def read_importance(folder: Path) -> Array:
    """Scores of all groups, float64 [groups]."""
    return np.asarray(read_table(folder / "importance.parquet", IMPORTANCE_SCHEMA)["score"].to_numpy())


def magnitude_scores(dense: Path, owners: Owners) -> Array:
    """L2 (Euclidean) norm of all weights of each group; tensors are read one at a time."""
    scores, read = zero_scores(owners), tensor_reader(weight_files(dense))
    for name in sorted(owners):
        (dim, owner), weight = owners[name], read(name).float()
        add_scores(scores, owner, weight.square().view(len(weight), -1).sum(1 - dim))
    return scores.sqrt().numpy()
