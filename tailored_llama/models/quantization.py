"""A checkpoint in 4 bits, for an adapter to be trained on (QLoRA: arXiv 2305.14314)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from tailored_llama.config import NF4_MULTIPLE, ExecutionConfig, Quantization, TrainingConfig, check_installed
from tailored_llama.errors import InputError
from tailored_llama.models.checkpoints import check_checkpoint, read_structure
from tailored_llama.models.devices import pick_device
from tailored_llama.models.load import _load_weights, stored_dtype
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

    In nf4, each block of 64 weights has a scale of its own, in float32. Embeddings, head and norms keep their type.
    PEFT's `prepare_model_for_kbit_training`, which would cast these to float32, is not called: norms are computed in
    float32 anyway, and the embeddings of a large vocabulary would take back the memory that 4 bits save. Projections
    are multiplied in `training.precision`. `work`, in words, needs the whole model; the rest is as of `open_model`.

    Raises:
        InputError: as `open_model` and `check_quantizable`.
    """
    if quantization == "none":
        return open_model(folder, execution, scratch, whole=work)
    check_quantizable(folder, quantization, execution.device)
    check_checkpoint(folder)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, training.precision)
    )
    model = _load_weights(
        folder,
        stored_dtype(folder),
        str(folder),
        quantization_config=settings,
        device_map={"": pick_device(execution.device)},  # each weight is quantised as it arrives there
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else the first pass without gradients, such as a held-out loss, packs the weights for inference for good
            # and rounds their scales to bfloat16.
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    return model.eval()


def check_quantizable(folder: Path, quantization: Quantization, device: str) -> None:
    """Check, from headers alone, that a checkpoint can be loaded in 4 bits here.

    On a CPU with AVX-512, bitsandbytes 0.50 silently reads the wrong scales where a row has half a block too many.

    Raises:
        InputError: bitsandbytes is not installed, or a width does not suit it.
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
