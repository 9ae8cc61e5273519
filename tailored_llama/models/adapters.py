"""Adapters: their base, also in 4 bits (QLoRA: arXiv 2305.14314); adding, saving and merging them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from tailored_llama.config import NF4_MULTIPLE, Dtype, ExecutionConfig, Quantization, TrainingConfig, check_installed
from tailored_llama.errors import InputError
from tailored_llama.models.cards import merged_card
from tailored_llama.models.checkpoints import FUSED, copy_tokenizer, drop_paths, read_structure, weights_digest
from tailored_llama.models.devices import pick_device
from tailored_llama.models.id_table import TABLE
from tailored_llama.models.load import BASE_FILE, load_model, load_weights, stored_dtype
from tailored_llama.models.sources import CARD, copy_licence
from tailored_llama.models.streaming import open_model


def load_base(
    folder: Path,
    quantization: Quantization,
    training: TrainingConfig,
    execution: ExecutionConfig,
    scratch: Path,
    work: str,
) -> Any:
    """Load the checkpoint that an adapter is trained on: as it is, or with its projections in 4 bits.

    In nf4, each block of 64 weights has a scale of its own, in float32, and products are in `training.precision`.
    Embeddings, head and norms keep their type; in float32, as PEFT's `prepare_model_for_kbit_training` casts them,
    embeddings would take back the memory that 4 bits save. `work`, in words, needs the whole model. The rest, and what
    is raised, is as of `open_model` and `check_quantizable`.
    """
    if quantization == "none":
        return open_model(folder, execution, scratch, whole=work)
    check_quantizable(folder, quantization, execution.device)
    read_structure(folder)  # refuses a broken one
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, training.precision)
    )
    places = {"": pick_device(execution.device)}  # each weight is quantised as it arrives there
    dtype = stored_dtype(folder)
    model = load_weights(folder, dtype, str(folder), quantization_config=settings, device_map=places)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else the first pass without gradients, such as a held-out loss, packs the weights for inference for good
            # and rounds their scales to bfloat16.
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    return model.eval()


def check_quantizable(folder: Path, quantization: Quantization, device: str) -> None:
    """Raise InputError if a checkpoint cannot be loaded in 4 bits here: bitsandbytes is missing, or a width unfit.

    On a CPU with AVX-512, bitsandbytes 0.50 silently reads the wrong scales where a row has half a block too many.
    """
    if quantization == "none":
        return
    check_installed("bitsandbytes", f"model.quantization: got {quantization!r}", "none", "nf4")
    if pick_device(device) != "cpu":
        return
    structure = read_structure(folder)
    widths = {"hidden size": structure.hidden_size}  # the lengths of the rows of the projections
    for index, layer in enumerate(structure.layers):
        widths[f"layer {index}'s attention width"] = layer.heads * structure.head_dim
        widths[f"layer {index}'s MLP width"] = layer.channels
    for name, width in widths.items():
        if width % NF4_MULTIPLE:
            raise InputError(
                f"model.quantization: got {quantization!r} for {folder}, whose {name} is {width}; allowed on a "
                f"CPU: multiples of {NF4_MULTIPLE}, as from pruning.channel_multiple = {NF4_MULTIPLE}"
            )


def add_adapter(base: Any, training: TrainingConfig, execution: ExecutionConfig) -> Any:
    """Add a new adapter to a causal LM; returns the PEFT model."""
    from peft import LoraConfig, get_peft_model  # late: most stages need none of it

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
    (out / BASE_FILE).write_text(json.dumps({"weights": weights_digest(checkpoint)}) + "\n")
    (out / "README.md").write_text(
        "An adapter in PEFT's layout. Load it onto its checkpoint with `PeftModel.from_pretrained`; `base.json` "
        "holds the SHA-256 of that checkpoint's weights.\n"
    )


def merge_adapter(
    checkpoint: Path, adapter: Path | None, *, out: Path, card: str | None = None, half: Dtype | None = None
) -> None:
    """Write a checkpoint and its adapter to an existing folder as one checkpoint, with the same tokenizer and plan.

    The sum is rounded to the checkpoint's type, or, if that is float32, to `half`; so scores may differ from the
    attached adapter's. By default the card is the checkpoint's own, updated to mention the merge. Raises InputError as
    `load_model`.
    """
    model = load_model(checkpoint, adapter)
    if half and model.dtype == torch.float32:
        model.to(getattr(torch, half))
    save_changed(model, checkpoint, out, card)


def save_changed(model: Any, checkpoint: Path, out: Path, card: str | None = None) -> None:
    """Write a checkpoint's model with changed weights, and all else that the checkpoint has."""
    model.save_pretrained(out)
    copy_tokenizer(checkpoint, out)
    copy_licence(checkpoint, out)
    for name in (TABLE, "plan.parquet"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
    drop_paths(out)
    (out / CARD).write_text(card or merged_card(checkpoint), encoding="utf-8")
