"""Count what a checkpoint costs to run, from its tensor shapes alone: parameters, bytes, FLOPs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tailored_llama.errors import InputError
from tailored_llama.models import all_tensor_shapes, check_checkpoint, read_structure, weight_files


@dataclass(frozen=True)
class Load:
    """The tokens of each prompt in a pass; prefill gives the first new token, decoding the others."""

    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Costs:
    """What a checkpoint costs to run, as `count_costs` counts it."""

    parameters: int
    computed_parameters: int
    weight_bytes: int
    linear_flops: int
    attention_flops: int
    prompt_flops: int


def count_costs(folder: Path, load: Load) -> Costs:
    """Count what a checkpoint costs, from the headers of its files.

    - `parameters`: all stored parameters; tied ones count once.
    - `computed_parameters`: all but an untied input embedding, of which a token reads only one row.
    - `linear_flops`, of one decoded token: 2 × the entries of all matrices in the layers and the head.
    - `attention_flops`, of the last decoded token: Σ over layers of 4 × heads × head_dim × seen (2 for scores, 2 for
      values). `seen` is prompt_tokens + new_tokens − 1, the token included, or the layer's sliding window if smaller.
    - `prompt_flops`, of one prompt: the layers' matrices for every token, the head for the last token, and attention
      from every token to those that it sees.

    Norms, biases, softmax and activations are not counted: their cost is linear in the size of their input.

    Raises:
        InputError: the checkpoint is broken or not supported.
    """
    structure = read_structure(folder)
    shapes = all_tensor_shapes(folder)
    if (embedding := shapes.get("model.embed_tokens.weight")) is None:
        raise InputError(f"{folder}: tensor 'model.embed_tokens.weight' is missing from its safetensors")
    head = math.prod(embedding)
    inner = sum(math.prod(s) for name, s in shapes.items() if name.startswith("model.layers.") and len(s) == 2)
    config = model_config(folder)
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)  # without it, a window applies to all layers
    context, last, prompt = load.prompt_tokens + load.new_tokens - 1, 0, 0
    for index, layer in enumerate(structure.layers):
        local = kinds is None or kinds[index] == "sliding_attention"
        widest = window if local and window is not None else context
        flops_per_seen = 4 * layer.heads * structure.head_dim
        last += flops_per_seen * min(context, widest)
        prompt += flops_per_seen * sum(min(seen, widest) for seen in range(1, load.prompt_tokens + 1))
    return Costs(
        parameters=structure.parameters,
        computed_parameters=structure.parameters - (head if "lm_head.weight" in shapes else 0),
        weight_bytes=sum(file.stat().st_size for file in weight_files(folder)),
        linear_flops=2 * (inner + head),
        attention_flops=last,
        prompt_flops=2 * (inner * load.prompt_tokens + head) + prompt,
    )


def model_config(folder: Path) -> Any:
    """The checkpoint's configuration, with the defaults of its model class."""
    check_checkpoint(folder)
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many types for invalid fields
        raise InputError(f"{folder / 'config.json'}: cannot be read ({' '.join(str(error).split())[:200]})") from None
