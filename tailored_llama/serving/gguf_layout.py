"""Checkpoints as llama.cpp expresses them: what becomes of every tensor."""

import math
import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from gguf.constants import GGMLQuantizationType as Kind

from tailored_llama import models
from tailored_llama.config import GgufType
from tailored_llama.errors import InputError
from tailored_llama.serving.gguf_writing import Array
from tailored_llama.serving.settings import bits_of

_ARCHITECTURES = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
WIDE = Kind.F16  # of a matrix that is no whole blocks of any type
# What a matrix gets whose rows are no multiple of 256: another type of about as many bits, of blocks of 32.
_NARROW = {Kind.Q3_K: Kind.IQ4_NL, Kind.Q4_K: Kind.IQ4_NL, Kind.Q5_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0}
OF_GGML = frozenset({Kind.IQ4_NL, *_NARROW})  # the package `gguf` does not write them


class Part(NamedTuple):
    """A tensor of a file: the checkpoint's tensor and rows that it is made of, its names, its shape and its type."""

    stored: str
    rows: slice
    name: str  # in a checkpoint that fuses nothing
    tensor: str  # in GGUF
    shape: tuple[int, ...]
    kind: Kind
    inputs: int  # columns before channels are padded


@dataclass(frozen=True)
class Layout:
    """A checkpoint's widths, and the channels of its GGUF file, which fill whole blocks."""

    family: models.Family
    structure: models.Structure
    channels: int
    names: TensorNameMap
    query_factor: float  # what queries are multiplied by beyond what llama.cpp scales them by

    @property
    def name(self) -> str:
        """The architecture's name in llama.cpp."""
        return self.family.gguf

    def tensor_name(self, name: str) -> str:
        """GGUF's name of a tensor; an `InputError` if it has none."""
        if (found := self.names.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
            raise InputError(f"tensor {name}: llama.cpp's architecture {self.name} does not have it")
        return found


def layout_of(checkpoint: Path, gguf_type: GgufType = "f32") -> Layout:
    """Decide how a checkpoint is written in a type (f32 pads nothing); `InputError`: broken, or llama.cpp lacks it."""
    structure, config = models.read_structure(checkpoint), models.read_config(checkpoint)
    kind = structure.model_type
    family = models.family_of(kind)
    if not family.gguf:
        allowed = ", ".join(models.IN_GGUF)
        raise InputError(f"checkpoint {checkpoint}: architecture {kind}, which llama.cpp lacks; allowed: {allowed}")
    if family.converted:
        allowed = "a whole model, merged with its adapter, and rounded for no job"
        raise InputError(
            f"checkpoint {checkpoint}: architecture {kind}, which only llama.cpp writes; allowed: {allowed}"
        )
    if step := family.no_rope_step:
        rotated = [int((number + 1) % step != 0) for number in range(structure.depth)]
        if (got := config.get("no_rope_layers") or rotated) != rotated:
            field = f"{checkpoint / 'config.json'}: no_rope_layers"
            raise InputError(f"{field}: got {got}; allowed for llama.cpp: {rotated}")
    block = 1 if bits_of(gguf_type) >= 16 else 32  # of those of 256, other rows take another type
    channels = math.ceil(structure.layer.channels / block) * block
    names = get_tensor_name_map(_ARCHITECTURES[family.gguf], structure.depth)
    scaled = math.sqrt(models.query_scale(config) / config["query_pre_attn_scalar"]) if family.queries else 1.0
    return Layout(family, structure, channels, names, scaled)


def written_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a checkpoint that a GGUF file gets: all but a tied head."""
    tied = models.read_config(checkpoint).get("tie_word_embeddings", False)
    return {
        name: tuple(shape)
        for name, shape in models.all_tensor_shapes(checkpoint).items()
        if not name.endswith("inv_freq") and not (name == "lm_head.weight" and tied)
    }


def parts_of(checkpoint: Path, layout: Layout, gguf_type: GgufType, weighed: Container[str] = ()) -> list[Part]:
    """All tensors of a file of a type.

    `weighed` are those whose inputs are weighed. An embedding or a head in 3 to 5 bits that is none would lose much.
    """

    def kind(tensor: str, shape: tuple[int, ...]) -> Kind:
        if len(shape) == 1:
            return Kind.F32
        wanted = Kind[gguf_type.upper()]
        if tensor in (EMBEDDING, HEAD) and tensor not in weighed and bits_of(gguf_type) < 6:
            wanted = Kind.Q8_0
        while shape[-1] % GGML_QUANT_SIZES[wanted][0]:
            wanted = _NARROW.get(wanted, WIDE)
        return wanted

    parts = []
    for stored, (height, *width) in written_shapes(checkpoint).items():
        for name, rows in models.unfused(stored, layout.structure).items():
            shape = padded_shape(name, (len(range(*rows.indices(height))), *width), layout)
            tensor = layout.tensor_name(name)
            parts.append(Part(stored, rows, name, tensor, shape, kind(tensor, shape), (height, *width)[-1]))
    return parts


def padded_shape(name: str, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape of a tensor once its MLP channels are padded."""
    if not (match := re.fullmatch(r"model\.layers\.\d+\.mlp\.(\w+)_proj\.(\w+)", name)):
        return shape
    if match[1] == "down":
        return (shape[0], layout.channels) if match[2] == "weight" else shape
    return (layout.channels, *shape[1:])


def arranged(name: str, values: Array, layout: Layout) -> Array:
    """A tensor's values as llama.cpp has them: norms offset, queries scaled, rows in rotary order, channels padded."""
    if name.endswith("norm.weight"):
        values = values + np.float32(layout.family.norm_offset)
    if _is(name, layout.family.queries):
        values = values * np.float32(layout.query_factor)
    if layout.family.paired and _is(name, "q_proj", "k_proj"):
        values = _rotary_order(values, layout.structure.head_dim)
    shape = padded_shape(name, values.shape, layout)
    return np.pad(values, [(0, wide - have) for wide, have in zip(shape, values.shape, strict=True)])


def restored(name: str, values: Array, shape: tuple[int, ...], layout: Layout) -> Array:
    """The values of the checkpoint's tensor of a shape, which `arranged` has arranged."""
    if layout.family.paired and _is(name, "q_proj", "k_proj"):
        values = _rotary_order(values, layout.structure.head_dim, back=True)
    if _is(name, layout.family.queries):
        values = values / np.float32(layout.query_factor)
    if name.endswith("norm.weight"):
        values = values - np.float32(layout.family.norm_offset)
    return values[tuple(slice(size) for size in shape)]


def _is(name: str, *modules: str) -> bool:
    return name.split(".")[-2] in modules


def _rotary_order(values: Array, head_dim: int, back: bool = False) -> Array:
    """Rows of every head put from halves, [0 … d/2) and [d/2 … d), to pairs, (0, d/2), (1, d/2 + 1), …; or `back`."""
    split = (head_dim // 2, 2) if back else (2, head_dim // 2)
    heads = values.reshape(-1, *split, *values.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(values.shape))
