"""The pruning stage: plan, reconstruct, cut, and write the model card."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tailored_llama import models
from tailored_llama.config import Work
from tailored_llama.data import read_calibration
from tailored_llama.pruning.groups import KINDS
from tailored_llama.pruning.importance import in_passes
from tailored_llama.pruning.plan import PLAN_SCHEMA
from tailored_llama.pruning.reconstruction import reconstruct
from tailored_llama.pruning.settings import PruneSettings
from tailored_llama.pruning.split import SPLIT, first_cut, read_split
from tailored_llama.pruning.surgery import Cut, Planned, plan_cut, prune_checkpoint
from tailored_llama.pruning.vocabulary import read_shares
from tailored_llama.store import write_table


def prune_model(
    dense: Path,
    groups: Path,
    importance: Path,
    calibration: Path | None,
    split: Path | None,
    *,
    settings: PruneSettings,
    work: Work,
) -> dict[str, Any]:
    """Stage: write `plan.parquet` and the pruned checkpoint, both into one folder.

    The tokens of the split count towards the ratio first, and leave last: reconstruction reads the dense model's. Its
    method `none` reads no calibration.

    Raises:
        InputError: the ratio cannot be reached (the message names the largest or nearest that can), or the fits need
            more memory than the device has free.
    """
    structure = models.read_structure(dense)
    models.check_solver(structure, settings.reconstruction.method, work.execution.device)
    tokens = read_split(split) if split else None
    cut = plan_cut(Planned(dense, groups, importance, settings.ratio, settings.plan), tokens)
    columns = {"layer": cut.groups.layer, "kind": cut.groups.kind, "index": cut.groups.index, "kept": cut.kept}
    write_table(work.out / "plan.parquet", {"group": range(len(cut.kept))} | columns, PLAN_SCHEMA)
    with tempfile.TemporaryDirectory(dir=work.out) as scratch:
        fitted = _fit(cut, calibration, Path(scratch), settings, work)
        prune_checkpoint(dense, cut.layer, cut.stays, work.out, fitted, tokens)
    if split:
        shutil.copyfile(split / SPLIT, work.out / SPLIT)  # says what it was chosen by
    before, after = structure.size, models.read_structure(work.out).size
    removed = models.what_was_removed(before, after, settings.plan, settings.reconstruction)
    card = models.derived_card("A structurally pruned language model", removed, dense, work.out)
    (work.out / models.CARD).write_text(card, encoding="utf-8")
    facts: dict[str, Any] = {
        "parameters": after.parameters,
        "ratio": round(1 - after.parameters / before.parameters, 6),
        "body_ratio": round(1 - after.body / before.body, 6),
    }
    return facts | ({"tokens": after.vocab_size, "tokens_whole": round(tokens.whole, 6)} if tokens else {})


def _fit(cut: Cut, calibration: Path | None, scratch: Path, settings: PruneSettings, work: Work) -> list[Path]:
    """Reconstruct what stays, if anything of the layers leaves; returns the files of the fitted tensors."""
    if settings.reconstruction.method == "none" or cut.kept.all():
        return []
    assert calibration is not None
    model = models.open_model(cut.dense, work.execution, scratch)
    batches = in_passes(read_calibration(calibration), work.execution.batch_tokens, even=True)
    fitted: list[Path] = []
    for tensors in reconstruct(model, batches, cut.stays, settings.reconstruction.ridge, work.progress):
        fitted.append(scratch / f"{len(fitted)}.safetensors")
        save_file(tensors, fitted[-1])
    return fitted


def check_ratio(
    dense: Path, groups: Path, counts: Path | None, *, settings: PruneSettings, work: Work
) -> dict[str, int]:
    """Stage: check that a ratio can be reached, before anything expensive; write how many stay as `reach.json`.

    Raises:
        InputError: as in `plan_cut` and `choose_tokens`.
    """
    planned = Planned(dense, groups, None, settings.ratio, settings.plan)
    cut = first_cut(planned, models.read_tokens(dense), read_shares(counts)) if counts else plan_cut(planned)
    stay = {kind: int(cut.kept[cut.groups.kind == kind].sum()) for kind in KINDS}
    stay |= {"tokens": len(cut.tokens.kept)} if cut.tokens else {}
    (work.out / "reach.json").write_text(json.dumps(stay) + "\n")
    return stay
