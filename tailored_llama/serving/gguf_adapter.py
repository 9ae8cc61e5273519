"""A LoRA adapter as a GGUF file, which llama.cpp loads beside the file of its base."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from safetensors.torch import load_file

from tailored_llama.config import GgufType
from tailored_llama.errors import InputError
from tailored_llama.models import all_tensor_shapes, check_adapter
from tailored_llama.serving.gguf_layout import Array, Layout, layout_of, moved, unfused

_KINDS = {"LORA": "a LoRA", "PROMPT_TUNING": "a soft prompt"}


def write_gguf_adapter(checkpoint: Path, adapter: Path, *, gguf_type: GgufType, out: Path) -> None:
    """Write a LoRA adapter for the GGUF file of its checkpoint.

    Rows and columns follow that file, of type `gguf_type`: q and k in llama.cpp's rotary order, MLP channels padded to
    its blocks. `adapter` is a folder in PEFT's layout: LoRA or rsLoRA. Matrices are F32. `out` appears when it is
    complete.

    Raises:
        InputError: the adapter is broken or belongs to another checkpoint, or llama.cpp cannot express it.
    """
    layout = layout_of(checkpoint, gguf_type)
    check_adapter(checkpoint, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    _check_expressible(config, adapter)
    rank, alpha = config["r"], config["lora_alpha"]
    unfinished = out.with_name(out.name + ".part")
    writer = GGUFWriter(unfinished, layout.name)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        # llama.cpp multiplies by alpha ÷ rank, rsLoRA by alpha ÷ √rank.
        writer.add_float32("adapter.lora.alpha", alpha * (math.sqrt(rank) if config.get("use_rslora") else 1))
        shapes = all_tensor_shapes(checkpoint)
        for name, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()):
            weight, side = _weight_of(name)
            if list(tensor.shape) != _expected_shape(shapes.get(weight), side, rank):
                raise InputError(f"adapter {adapter}: tensor {name} does not fit {checkpoint}")
            for part, rows in unfused(weight, layout).items():
                values = _arranged(part, side, rows, tensor.float().numpy(), layout)
                writer.add_tensor(f"{layout.tensor_name(part)}.{side}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_expressible(config: dict[str, Any], adapter: Path) -> None:
    kind = str(config.get("peft_type"))
    found = "DoRA" if config.get("use_dora") else _KINDS.get(kind, kind)
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(field):
            found = f"an adapter with {field}"
    if found != _KINDS["LORA"]:
        merges = "it merges into its checkpoint: `tailored-llama merge`"
        hint = merges if kind == "LORA" else "serve it with transformers"
        raise InputError(f"adapter {adapter}: is {found}; allowed in GGUF: LoRA or rsLoRA ({hint})")


def _weight_of(name: str) -> tuple[str, str]:
    """The weight that a tensor of an adapter changes, and which of the two matrices it is: lora_a or lora_b."""
    module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return f"{module}.weight", side.lower()


def _expected_shape(weight: list[int] | None, side: str, rank: int) -> list[int] | None:
    if weight is None or len(weight) != 2:
        return None
    return [rank, weight[1]] if side == "lora_a" else [weight[0], rank]


def _arranged(weight: str, side: str, rows: slice, values: Array, layout: Layout) -> Array:
    """One matrix in the order and size of its weight: lora_a [rank, inputs] has its columns, lora_b [outputs, rank] its
    rows."""
    if side == "lora_b":
        values = values[rows]
    touched = ("q_proj", "k_proj", "gate_proj", "up_proj") if side == "lora_b" else ("down_proj",)
    changed = any(part in weight for part in touched)
    return np.ascontiguousarray(moved(weight, values, layout) if changed else values)
