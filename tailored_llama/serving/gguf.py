"""A checkpoint as a GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio).

Every number is written and quantised by the package `gguf`. Layers that are all alike become the architecture `llama`
or `qwen2`. Layers of different widths become `deci`, whose graph reads heads, key/value heads and widths of each layer.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, TensorNameMap, get_tensor_name_map
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize
from transformers import AutoConfig

from tailored_llama.config import K_QUANTS, GgufType
from tailored_llama.errors import InputError
from tailored_llama.models import (
    CARD,
    GGUF_KINDS,
    LAYERED_PREFIX,
    Layer,
    Structure,
    all_tensor_shapes,
    check_checkpoint,
    front_matter,
    read_config,
    read_structure,
    tensor_reader,
    weight_files,
)
from tailored_llama.progress import Progress, silent
from tailored_llama.serving.gguf_rope import context_length, rope_factors, write_rope
from tailored_llama.serving.gguf_tokenizer import write_tokenizer
from tailored_llama.serving.llama_cpp import load_llama_cpp, requantise

_STOCK = {"llama": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}
_WIDE = GGMLQuantizationType.F16  # of a matrix that is no whole blocks
_HEAD_NAMES = ("token_embd.weight", "output.weight")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """How a checkpoint's layers are written.

    `permuted`: whether rotary embeddings turn neighbouring channels, as llama.cpp's `llama` and `deci` do, so that the
    rows of q and k change places. `written`: the widths of every layer in the file, which has zeros where the
    checkpoint has nothing.
    """

    arch: MODEL_ARCH
    structure: Structure
    permuted: bool
    written: tuple[Layer, ...]
    names: TensorNameMap

    def tensor_name(self, name: str) -> str:
        """GGUF's name of a tensor.

        Raises:
            InputError: it has none.
        """
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"tensor {name}: llama.cpp's architecture {MODEL_ARCH_NAMES[self.arch]} does not have it")
        return found


@dataclass(frozen=True)
class Written:
    """What a GGUF file holds: its architecture, bytes, MLP channels added as padding, and tensors of a wider type."""

    architecture: str
    size: int
    padded_channels: int
    kept_wider: int


def layout_of(checkpoint: Path, gguf_type: GgufType) -> Layout:
    """How a checkpoint is written in a type.

    Raises:
        InputError: the checkpoint is broken, or llama.cpp cannot express it.
    """
    check_checkpoint(checkpoint)
    structure = read_structure(checkpoint)
    kind = structure.model_type.removeprefix(LAYERED_PREFIX)
    layered = structure.model_type != kind
    if kind not in GGUF_KINDS:
        hint = "llama.cpp's own convert_hf_to_gguf.py may know it"
        if layered:
            hint = "llama.cpp's architecture for layers of different widths has no part for it"
        raise InputError(f"checkpoint {checkpoint}: architecture {kind}; allowed: {', '.join(GGUF_KINDS)} ({hint})")
    arch = MODEL_ARCH.DECI if layered else _STOCK[kind]
    block = 32 if gguf_type in K_QUANTS else GGML_QUANT_SIZES[GGMLQuantizationType[gguf_type.upper()]][0]
    written = tuple(_written(layer, number, block) for number, layer in enumerate(structure.layers))
    names = get_tensor_name_map(arch, len(structure.layers))
    return Layout(arch, structure, arch != MODEL_ARCH.QWEN2, written, names)


def _written(layer: Layer, number: int, block: int) -> Layer:
    """The widths of a layer in the file.

    llama.cpp's `deci` skips the attention of a layer without MLP, too, and takes the size of all heads to be 0 if the
    first layer has none. So a missing MLP is written as one block of zeros, and that attention as one head of zeros.
    """
    heads, kv_heads = (layer.heads, layer.kv_heads) if layer.heads or number else (1, 1)
    return Layer(heads, kv_heads, math.ceil(max(1, layer.channels) / block) * block)


def write_gguf(
    checkpoint: Path, *, gguf_type: GgufType, out: Path, name: str | None = None, progress: Progress = silent
) -> Written:
    """Write a checkpoint of type llama, mistral or qwen2, uniform or per layer, as one GGUF file, tensor by tensor.

    In a type of blocks, MLP channels are padded with zeros to whole blocks, which is exact: silu(0) · 0 = 0. Matrices
    whose rows are no whole blocks stay in F16. Vectors are F32. In files of 4 or 5 bits the embedding and the head are
    Q8_0. K-quants are made by llama.cpp itself from an F16 file. The file appears when it is complete. By default, the
    model's name in the metadata is the folder's. `progress` is called after every tensor.

    Raises:
        InputError: as `layout_of` and `write_tokenizer`, or the rotary embedding is scaled in a way not known here.
    """
    layout = layout_of(checkpoint, gguf_type)
    if gguf_type in K_QUANTS:
        load_llama_cpp(gguf_type)  # fails before anything is written
    part, f16 = (out.with_name(f"{out.name}.{suffix}") for suffix in ("part", "f16.part"))
    try:
        if gguf_type in K_QUANTS:
            kept_wider = _write(checkpoint, layout, "f16", f16, name, progress)
            requantise(f16, gguf_type, part)
        else:
            kept_wider = _write(checkpoint, layout, gguf_type, part, name, progress)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
        f16.unlink(missing_ok=True)
    padded = sum(layer.channels for layer in layout.written) - sum(layer.channels for layer in layout.structure.layers)
    return Written(MODEL_ARCH_NAMES[layout.arch], out.stat().st_size, padded, kept_wider)


def _write(
    checkpoint: Path, layout: Layout, gguf_type: GgufType, out: Path, name: str | None, progress: Progress
) -> int:
    """Write the file; returns the number of matrices of a wider type."""
    writer = GGUFWriter(out, MODEL_ARCH_NAMES[layout.arch])
    config: Any = AutoConfig.from_pretrained(checkpoint)
    _write_metadata(writer, layout, config, checkpoint, name or checkpoint.resolve().name, gguf_type)
    write_tokenizer(writer, checkpoint, config.vocab_size)
    tensors = [
        (stored, shape, _tensor_type(stored, shape, gguf_type), values)
        for stored, shape, values in _tensors(checkpoint, layout, config)
    ]
    for stored, shape, own, _ in tensors:
        byte_shape = quant_shape_to_byte_shape(shape, own)
        writer.add_tensor_info(stored, byte_shape, np.dtype(np.uint8), math.prod(byte_shape), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (_, _, own, values) in enumerate(tensors, 1):
        writer.write_tensor_data(quantize(values(), own).view(np.uint8))
        progress(done, len(tensors))
    writer.close()
    blocks = gguf_type not in ("f32", "f16", "bf16")
    return sum(blocks and len(shape) > 1 and own == _WIDE for _, shape, own, _ in tensors)


def _write_metadata(
    writer: GGUFWriter, layout: Layout, config: Any, checkpoint: Path, name: str, gguf_type: GgufType
) -> None:
    structure, layered = layout.structure, layout.arch == MODEL_ARCH.DECI
    writer.add_type("model")
    writer.add_name(name)
    stated = front_matter(checkpoint / CARD)
    for key in ("license", "license_name", "license_link"):
        if isinstance(value := stated.get(key), str):
            getattr(writer, f"add_{key}")(value)
    if isinstance(base := stated.get("base_model"), str):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType[f"{'ALL' if gguf_type == 'f32' else 'MOSTLY'}_{gguf_type.upper()}"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(structure.hidden_size)
    writer.add_block_count(len(structure.layers))
    written = layout.written
    widths = [[la.channels for la in written], [la.heads for la in written], [la.kv_heads for la in written]]
    for add_width, values in zip(
        (writer.add_feed_forward_length, writer.add_head_count, writer.add_head_count_kv), widths, strict=True
    ):
        add_width(values if layered else values[0])
    writer.add_key_length(structure.head_dim)
    writer.add_value_length(structure.head_dim)
    writer.add_rope_dimension_count(structure.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    write_rope(writer, config, checkpoint)


def _tensors(
    checkpoint: Path, layout: Layout, config: Any
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Array]]]:
    """GGUF name, shape and float32 values (read when called) of every tensor of a file."""
    read = tensor_reader(weight_files(checkpoint))

    def values(name: str) -> Array:
        return arranged(name, read(name).to(torch.float32).numpy(), layout)

    yield from rope_factors(config, layout.structure.head_dim)
    for name, shape in written_shapes(checkpoint).items():
        yield layout.tensor_name(name), padded_shape(name, shape, layout), partial(values, name)
    for name, shape in _stand_ins(layout):
        yield layout.tensor_name(name), shape, partial(np.zeros, shape, np.float32)


def _stand_ins(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of zeros in the place of blocks that the checkpoint does not have."""
    hidden, head = layout.structure.hidden_size, layout.structure.head_dim
    for number, (own, written) in enumerate(zip(layout.structure.layers, layout.written, strict=True)):
        prefix = f"model.layers.{number}"
        if written.heads and not own.heads:
            yield f"{prefix}.input_layernorm.weight", (hidden,)
            yield from ((f"{prefix}.self_attn.{name}_proj.weight", (head, hidden)) for name in "qkv")
            yield f"{prefix}.self_attn.o_proj.weight", (hidden, head)
        if not own.channels:
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
            yield from ((f"{prefix}.mlp.{name}_proj.weight", (written.channels, hidden)) for name in ("gate", "up"))
            yield f"{prefix}.mlp.down_proj.weight", (hidden, written.channels)


def written_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a checkpoint that a GGUF file gets: all but a tied head."""
    tied = read_config(checkpoint).get("tie_word_embeddings", False)
    return {
        name: tuple(shape)
        for name, shape in all_tensor_shapes(checkpoint).items()
        if not name.endswith("inv_freq") and not (name == "lm_head.weight" and tied)
    }


def padded_shape(name: str, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape of a tensor once its MLP channels are padded."""
    if not (match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.(\w+)_proj\.(\w+)", name)):
        return shape
    channels = layout.written[int(match[1])].channels
    if match[2] == "down":
        return (shape[0], channels) if match[3] == "weight" else shape
    return (channels, *shape[1:])


def arranged(name: str, values: Array, layout: Layout) -> Array:
    """A tensor's values with the rows of q and k in llama.cpp's rotary order, and MLP channels padded with zeros."""
    if layout.permuted and ("q_proj" in name or "k_proj" in name):
        values = rotary_order(values, layout.structure.head_dim)
    shape = padded_shape(name, values.shape, layout)
    return np.pad(values, [(0, wide - have) for wide, have in zip(shape, values.shape, strict=True)])


def rotary_order(values: Array, head_dim: int, back: bool = False) -> Array:
    """Rows of every head reordered from halves, [0 … d/2) and [d/2 … d), to pairs, (0, d/2), (1, d/2 + 1), …

    `back` is the other way round.
    """
    split = (head_dim // 2, 2) if back else (2, head_dim // 2)
    heads = values.reshape(-1, *split, *values.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(values.shape))


def _tensor_type(name: str, shape: tuple[int, ...], gguf_type: GgufType) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[gguf_type.upper()]
    if name in _HEAD_NAMES and gguf_type[:2] in ("q4", "q5"):
        wanted = GGMLQuantizationType.Q8_0
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else _WIDE
