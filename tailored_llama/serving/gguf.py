"""A checkpoint as a GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio).

Every number is written and quantised by the package `gguf`. Layers that are all alike become the architecture of the
same name, or `llama`. Layers of different widths become `deci`, whose graph reads heads, key/value heads and widths of
each layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from transformers import AutoConfig

from tailored_llama.config import K_QUANTS, GgufType
from tailored_llama.models import tensor_reader, weight_files
from tailored_llama.progress import Progress, silent
from tailored_llama.serving.gguf_layout import Layout, arranged, layout_of, padded_shape, unfused, written_shapes
from tailored_llama.serving.gguf_metadata import rope_factors, write_metadata
from tailored_llama.serving.gguf_tokenizer import write_tokenizer
from tailored_llama.serving.gguf_writing import Array, GgufTensor, unfinished, write_file
from tailored_llama.serving.llama_cpp import load_llama_cpp, requantise

_WIDE = GGMLQuantizationType.F16  # of a matrix that is no whole blocks
_HEAD_NAMES = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Written:
    """What a GGUF file holds: its architecture, bytes, MLP channels added as padding, and tensors of a wider type."""

    architecture: str
    size: int
    padded_channels: int
    kept_wider: int


def write_gguf(
    checkpoint: Path, *, gguf_type: GgufType, out: Path, name: str | None = None, progress: Progress = silent
) -> Written:
    """Write a checkpoint as one GGUF file, tensor by tensor.

    In a type of blocks, MLP channels are padded with zeros to whole blocks, which is exact: silu(0) · 0 = 0. Matrices
    whose rows are no whole blocks stay in F16. Vectors are F32. In files of 4 or 5 bits the embedding and the head are
    Q8_0. K-quants are made by llama.cpp itself from an F16 file. The file appears when it is complete. By default, the
    model's name in the metadata is the folder's. `progress` is called after every tensor.

    Raises:
        InputError: as `layout_of`, `write_metadata` and `write_tokenizer`.
    """
    layout = layout_of(checkpoint, gguf_type)
    if gguf_type in K_QUANTS:
        load_llama_cpp(f"type {gguf_type}")  # fails before anything is written
    with unfinished(out) as part:
        if gguf_type in K_QUANTS:
            with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
                kept_wider = _write(checkpoint, layout, "f16", f16 := Path(scratch) / "f16.gguf", name, progress)
                requantise(f16, gguf_type, part)
        else:
            kept_wider = _write(checkpoint, layout, gguf_type, part, name, progress)
    padded = sum(layer.channels for layer in layout.written) - sum(layer.channels for layer in layout.structure.layers)
    return Written(layout.name, out.stat().st_size, padded, kept_wider)


def _write(
    checkpoint: Path, layout: Layout, gguf_type: GgufType, out: Path, name: str | None, progress: Progress
) -> int:
    """Write the file; returns the number of matrices of a wider type."""
    writer = GGUFWriter(out, layout.name)
    config: Any = AutoConfig.from_pretrained(checkpoint)
    write_metadata(writer, layout, config, checkpoint, name or checkpoint.resolve().name, gguf_type)
    write_tokenizer(writer, checkpoint, config.vocab_size)

    def named(stored: str, shape: tuple[int, ...], values: Callable[[], Array]) -> GgufTensor:
        kind = _tensor_type(stored, shape, gguf_type)
        return stored, shape, kind, lambda: quantize(values(), kind)

    tensors = list(starmap(named, _tensors(checkpoint, layout, config)))
    write_file(writer, tensors, progress)
    blocks = gguf_type not in ("f32", "f16", "bf16")
    return sum(blocks and len(shape) > 1 and own == _WIDE for _, shape, own, _ in tensors)


def _tensors(
    checkpoint: Path, layout: Layout, config: Any
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Array]]]:
    """GGUF name, shape and float32 values (read when called) of every tensor of a file."""
    read = tensor_reader(weight_files(checkpoint))

    def values(name: str, part: str, rows: slice) -> Array:
        return arranged(part, read(name).to(torch.float32).numpy()[rows], layout)

    yield from rope_factors(config, layout.structure.head_dim)
    for name, shape in written_shapes(checkpoint).items():
        for part, rows in unfused(name, layout).items():
            own = (len(range(*rows.indices(shape[0]))), *shape[1:])
            yield layout.tensor_name(part), padded_shape(part, own, layout), partial(values, name, part, rows)
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


def _tensor_type(name: str, shape: tuple[int, ...], gguf_type: GgufType) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[gguf_type.upper()]
    if name in _HEAD_NAMES and gguf_type[:2] in ("q4", "q5"):
        wanted = GGMLQuantizationType.Q8_0
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else _WIDE
