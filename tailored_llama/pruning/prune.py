"""The pruning stage: plan, reconstruct, cut, and write the model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tailored_llama.config import Work
from tailored_llama.data import read_calibration
from tailored_llama.models import (
    CARD,
    check_solver,
    derived_card,
    open_model,
    read_structure,
    read_tokens,
    what_was_removed,
)
from tailored_llama.pruning.cut import Cut, Folders, plan_cut
from tailored_llama.pruning.groups import KINDS
from tailored_llama.pruning.layerwise import Text
from tailored_llama.pruning.plan import PLAN_SCHEMA
from tailored_llama.pruning.reconstruction import reconstruct
from tailored_llama.pruning.settings import PruneSettings
from tailored_llama.pruning.split import SPLIT, first_cut, read_split
from tailored_llama.store import write_table


def prune_model(
    model: Path,
    original: Path,
    groups: Path,
    importance: Path,
    calibration: Path | None,
    split: Path | None,
    *,
    settings: PruneSettings,
    work: Work,
) -> dict[str, Any]:
    """Stage: write `plan.parquet` and the pruned checkpoint, both into one folder.

    The ratio is of the parameters of the original, the model before the first step. Tokens, for the kind vocabulary
    those of the split, count towards it first, and leave last: reconstruction reads the dense model's tokens. Where
    they reach the ratio alone, the layers stay as they are. The method `none` does not read the calibration.

    Raises:
        InputError: the ratio cannot be reached (the message names the largest or nearest that can), or the fits need
            more memory than the device has free.
    """
    structure, before = read_structure(model), read_structure(original).size
    check_solver(structure, settings.reconstruction.method, work.execution.device)
    folders = Folders(model, original, groups, importance)
    cut = plan_cut(folders, settings.ratio, settings.plan, read_split(split) if split else None)
    columns = {"layer": cut.groups.layer, "kind": cut.groups.kind, "index": cut.groups.index, "kept": cut.kept}
    write_table(work.out / "plan.parquet", {"group": range(len(cut.kept))} | columns, PLAN_SCHEMA)
    with tempfile.TemporaryDirectory(dir=work.out) as scratch:
        cut.write(work.out, _fit(cut, calibration, Path(scratch), settings, work))
    if split:
        shutil.copyfile(split / SPLIT, work.out / SPLIT)  # for the report
    after = read_structure(work.out)
    removed = what_was_removed(before, after.size, settings.plan, settings.reconstruction)
    card = derived_card("A structurally pruned language model", removed, model, work.out)
    (work.out / CARD).write_text(card, encoding="utf-8")
    facts: dict[str, Any] = {"parameters": after.size.parameters}
    facts["ratio"] = round(1 - after.size.parameters / before.parameters, 6)
    facts["body_ratio"] = round(1 - after.size.body / before.body, 6)
    tokens = cut.tokens
    return facts | ({"tokens": after.size.vocab_size, "tokens_whole": round(tokens.whole, 6)} if tokens else {})


def _fit(cut: Cut, calibration: Path | None, scratch: Path, settings: PruneSettings, work: Work) -> list[Path]:
    """Reconstruct what stays, if anything of the layers leaves; returns the files of the fitted tensors."""
    if settings.reconstruction.method == "none" or cut.kept.all():
        return []
    assert calibration is not None
    model = open_model(cut.model, work.execution, scratch)
    text = Text(read_calibration(calibration), work.execution.batch_tokens)
    fitted: list[Path] = []
    for tensors in reconstruct(model, text, cut.stays, settings.reconstruction.ridge, work.progress):
        fitted.append(scratch / f"{len(fitted)}.safetensors")
        save_file(tensors, fitted[-1])
    return fitted


def check_ratio(
    dense: Path, groups: Path, counts: Path | None, *, settings: PruneSettings, work: Work
) -> dict[str, int]:
    """Stage: check that a ratio can be reached, before anything expensive; write `reach.json`.

    The plan that it makes has no importances yet. What counts is how many groups of each kind and tokens stay.

    Raises:
        InputError: as in `plan_cut` and `choose_tokens`.
    """
    folders = Folders(dense, dense, groups)
    if counts:
        cut = first_cut(folders, read_tokens(dense), counts, settings.ratio, settings.plan)
    else:
        cut = plan_cut(folders, settings.ratio, settings.plan, None)
    stay = {kind: int(cut.kept[cut.groups.kind == kind].sum()) for kind in KINDS}
    stay |= {"tokens": len(cut.tokens.kept)} if cut.tokens else {}
    (work.out / "reach.json").write_text(json.dumps(stay) + "\n")
    return stay
