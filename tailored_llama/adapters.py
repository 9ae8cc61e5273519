"""Adapters: fresh ones on a causal LM, and their files in PEFT's layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model

from tailored_llama.checkpoints import weights_digest
from tailored_llama.config import SOFT, ExecutionConfig, TrainingConfig, TuningConfig
from tailored_llama.models import BASE_FILE
from tailored_llama.pruning.groups import FUSED
from tailored_llama.soft_prompts import soft_prompt_config


def adapted(base: Any, training: TrainingConfig, execution: ExecutionConfig) -> Any:
    """A PEFT model with a fresh adapter on a causal LM."""
    if isinstance(training, TuningConfig) and training.variant in SOFT:
        settings = soft_prompt_config(base, training.variant, training.virtual_tokens)
    else:
        settings = LoraConfig(
            r=training.rank,
            lora_alpha=training.alpha,
            lora_dropout=training.dropout,
            use_rslora=training.variant == "rslora",
            use_dora=training.variant == "dora",
            target_modules=_targets(base, training.targets),
            task_type="CAUSAL_LM",
        )
    model = get_peft_model(base, settings)
    if execution.recompute_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _targets(model: Any, wanted: Sequence[str]) -> list[str]:
    """The model's own names of the wanted projections: where it holds several in one, that one."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    whole = {part: fused for fused, parts in FUSED.items() for part in parts}
    return sorted({name if name in names else whole.get(name, name) for name in wanted})


def save_adapter(model: Any, checkpoint: Path, out: Path) -> None:
    """Write an adapter in PEFT's layout, with the digest of the weights it was trained on."""
    model.save_pretrained(out)
    config = json.loads((out / "adapter_config.json").read_text())
    if "target_modules" in config:
        config["target_modules"].sort()  # a set in PEFT: its order would differ from process to process
    config["base_model_name_or_path"] = None  # never a path of this machine; base.json says which weights
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / BASE_FILE).write_text(json.dumps({"weights": weights_digest(checkpoint)}) + "\n")
    (out / "README.md").write_text(
        "An adapter in PEFT's layout. Load it onto its checkpoint with `PeftModel.from_pretrained`; `base.json` "
        "holds the SHA-256 of that checkpoint's weights.\n"
    )
