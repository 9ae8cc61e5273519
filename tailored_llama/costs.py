"""Counting what a checkpoint costs to run, by its shapes alone: parameters, bytes, FLOPs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tailored_llama.checkpoints import check_checkpoint, read_structure, tensor_shapes, weight_files
from tailored_llama.errors import InputError


@dataclass(frozen=True)
class Work:
    """What a pass does with each of its prompts; the first new token comes with the prompt, the others by decoding."""

    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Costs:
    """What a checkpoint costs by its shapes alone, as `count_costs` counts it."""

    parameters: int
    computed_parameters: int
    weight_bytes: int
    linear_flops: int
    attention_flops: int
    prompt_flops: int


def count_costs(folder: Path, work: Work) -> Costs:
    """Count what a checkpoint costs, from the headers of its files.

    - `parameters`: all that are stored, tied ones once.
    - `computed_parameters`: without an input embedding that is not the output head too, of which a token reads one row.
    - `linear_flops`, of one decoded token: 2 × the entries of all matrices of the layers and of the head.
    - `attention_flops`, of the last decoded token: Σ over layers of 4 × heads × head_dim × seen (2 for scores, 2 for
      values), where seen is prompt_tokens + new_tokens − 1, itself counted, or the layer's sliding window if less.
    - `prompt_flops`, of one prompt: the layers' matrices for each token, the head's for the last one, and attention to
      what each token sees.

    Norms, biases, softmax and activations are not counted: they are linear in what is.

    Raises:
        InputError: the checkpoint is broken or not supported.
    """
    structure = read_structure(folder)
    files = weight_files(folder)
    shapes = {name: shape for file in files for name, shape in tensor_shapes(file).items()}
    if (embedding := shapes.get("model.embed_tokens.weight")) is None:
        raise InputError(f"{folder}: tensor 'model.embed_tokens.weight' is missing from its safetensors")
    head = math.prod(embedding)
    inner = sum(math.prod(s) for name, s in shapes.items() if name.startswith("model.layers.") and len(s) == 2)
    config = model_config(folder)
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)  # absent, a window is that of all layers
    context, last, prompt = work.prompt_tokens + work.new_tokens - 1, 0, 0
    for index, layer in enumerate(structure.layers):
        local = kinds is None or kinds[index] == "sliding_attention"
        widest = window if local and window is not None else context
        each = 4 * layer.heads * structure.head_dim
        last += each * min(context, widest)
        prompt += each * sum(min(seen, widest) for seen in range(1, work.prompt_tokens + 1))
    return Costs(
        parameters=structure.parameters,
        computed_parameters=structure.parameters - (head if "lm_head.weight" in shapes else 0),
        weight_bytes=sum(file.stat().st_size for file in files),
        linear_flops=2 * (inner + head),
        attention_flops=last,
        prompt_flops=2 * (inner * work.prompt_tokens + head) + prompt,
    )


def model_config(folder: Path) -> Any:
    """The configuration with its defaults, as the model reads it."""
    check_checkpoint(folder)
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many types for fields it does not like
        raise InputError(f"{folder / 'config.json'}: cannot be read ({' '.join(str(error).split())[:200]})") from None
