"""Adapters: adding, saving and merging them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tailored_llama.config import AdapterConfig, Dtype, Work
from tailored_llama.errors import InputError
from tailored_llama.models.cards import merged_card
from tailored_llama.models.checkpoints import FUSED, copy_tokenizer, weights_digest
from tailored_llama.models.id_table import TABLE
from tailored_llama.models.load import BASE_FILE, check_adapter, load_model
from tailored_llama.models.sources import CARD, copy_licence
from tailored_llama.store import MANIFEST


def add_adapter(base: Any, adapter: AdapterConfig) -> Any:
    """Add a new adapter to a causal LM; returns the PEFT model. InputError: its experts take no dropout."""
    from peft import LoraConfig, get_peft_model  # late: most stages need none of it

    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=_targets(base, adapter.targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(base, settings)
    except ValueError:  # experts that are one tensor
        if not adapter.dropout:
            raise
        raise InputError(f"dropout: got {adapter.dropout} for a mixture of experts; allowed: 0") from None


def _targets(model: Any, projections: Sequence[str]) -> list[str]:
    """The model's own names of the projections; a fused one stands for its parts."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    fused_names = {part: fused for fused, parts in FUSED.items() for part in parts}
    return sorted({name if name in names else fused_names.get(name, name) for name in projections})


def save_adapter(model: Any, checkpoint: Path, out: Path) -> None:
    """Write an adapter in PEFT's layout, with the digest of the weights it was trained on."""
    model.save_pretrained(out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"].sort()  # a set in PEFT, whose order differs between processes
    config["base_model_name_or_path"] = None  # no local path; base.json identifies the weights
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    _write_base(checkpoint, out)
    (out / "README.md").write_text(
        "An adapter in PEFT's layout. Load it onto its checkpoint with `PeftModel.from_pretrained`; `base.json` "
        "holds the SHA-256 of that checkpoint's weights.\n"
    )


def _write_base(checkpoint: Path, out: Path) -> None:
    (out / BASE_FILE).write_text(json.dumps({"weights": weights_digest(checkpoint)}) + "\n")


def carry_adapter(adapter: Path, dense: Path, trimmed: Path, *, settings: None, work: Work) -> None:
    """Stage: give a dense model's adapter to the same model with fewer tokens, whose layers are the same.

    Raises:
        InputError: the adapter is not of the dense model.
    """
    check_adapter(dense, adapter)
    shutil.copytree(adapter, work.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    _write_base(trimmed, work.out)


def merge_adapter(
    checkpoint: Path, adapter: Path | None, *, out: Path, card: str | None = None, half: Dtype | None = None
) -> None:
    """Write a checkpoint and its adapter to an existing folder as one checkpoint, with the same tokenizer and plan.

    The sum is rounded to the checkpoint's type, or, if that is float32, to `half`; so scores may differ from the
    attached adapter's. By default the card is the checkpoint's own, updated to mention an adapter. Raises InputError as
    `load_model`.
    """
    model = load_model(checkpoint, adapter)
    if half and model.dtype == torch.float32:
        model.to(getattr(torch, half))
    model.save_pretrained(out)
    copy_tokenizer(checkpoint, out)
    copy_licence(checkpoint, out)
    for name in (TABLE, "plan.parquet"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
    (out / CARD).write_text(card or merged_card(checkpoint, tuned=adapter is not None), encoding="utf-8")
