"""A LoRA adapter as a GGUF file, which llama.cpp loads beside the file of its base."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from safetensors.torch import load_file

from tailored_llama.config import GgufType
from tailored_llama.errors import InputError
from tailored_llama.models import all_tensor_shapes, check_adapter
from tailored_llama.serving.gguf_layout import layout_of, moved, unfused
from tailored_llama.serving.gguf_writing import GgufTensor, unfinished, write_file

_KINDS = {"LORA": "a LoRA", "PROMPT_TUNING": "a soft prompt"}
# Whose matrix follows its weight in order and size: of outputs by its rows, of inputs by its columns.
_MOVED = {"lora_b": ("q_proj", "k_proj", "gate_proj", "up_proj"), "lora_a": ("down_proj",)}


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
    shapes = all_tensor_shapes(checkpoint)
    tensors: list[GgufTensor] = []
    for name, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()):
        module, _, lora = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        side, shape = lora.lower(), shapes.get(f"{module}.weight", [])  # lora_a [rank, inputs], lora_b [outputs, rank]
        expected = [rank, *shape[1:]] if side == "lora_a" else [*shape[:1], rank]
        if len(shape) != 2 or list(tensor.shape) != expected:
            raise InputError(f"adapter {adapter}: tensor {name} does not fit {checkpoint}")
        for part, rows in unfused(f"{module}.weight", layout).items():
            values = tensor.float().numpy()[rows if side == "lora_b" else slice(None)]
            if any(projection in part for projection in _MOVED.get(side, ())):
                values = moved(part, values, layout)
            data = partial(np.ascontiguousarray, values)
            tensors.append((f"{layout.tensor_name(part)}.{side}", values.shape, GGMLQuantizationType.F32, data))
    with unfinished(out) as file:
        writer = GGUFWriter(file, layout.name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        # llama.cpp multiplies by alpha ÷ rank, rsLoRA by alpha ÷ √rank.
        writer.add_float32("adapter.lora.alpha", alpha * (math.sqrt(rank) if config.get("use_rslora") else 1))
        write_file(writer, tensors)


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
