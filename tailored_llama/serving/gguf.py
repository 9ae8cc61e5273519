"""A checkpoint as a GGUF file, for llama.cpp and what is built on it (such as LM Studio).

Every number is written and quantised by the package `gguf`.
"""

import tempfile
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import quantize
from transformers import AutoConfig

from tailored_llama.config import K_QUANTS, GgufType
from tailored_llama.errors import InputError
from tailored_llama.files import unfinished
from tailored_llama.models import tensor_reader, weight_files
from tailored_llama.progress import Progress, silent
from tailored_llama.serving.converter import convert, is_converted
from tailored_llama.serving.gguf_layout import (
    EMBEDDING,
    HEAD,
    OF_GGML,
    WIDE,
    Layout,
    Part,
    arranged,
    layout_of,
    parts_of,
    written_shapes,
)
from tailored_llama.serving.gguf_metadata import rope_factors, write_metadata, write_origin
from tailored_llama.serving.gguf_writing import Array, GgufTensor, write_file
from tailored_llama.serving.imatrix import Importance
from tailored_llama.serving.job import Job, by_layer, importance_of, rounded_for
from tailored_llama.serving.llama_cpp import load_llama_cpp, quantise_rows, requantise
from tailored_llama.serving.settings import bits_of


@dataclass(frozen=True)
class Written:
    """A written GGUF file: its architecture, bytes, MLP channels added as padding, and matrices of a wider type."""

    architecture: str
    size: int
    padded_channels: int
    kept_wider: int


def write_gguf(
    checkpoint: Path,
    *,
    gguf_type: GgufType,
    out: Path,
    name: str | None = None,
    by: Job | Importance | None = None,
    progress: Progress = silent,
) -> Written:
    """Write a checkpoint as one GGUF file, tensor by tensor.

    In a type of blocks, MLP channels are padded with zeros to whole blocks, which is exact: silu(0) · 0 = 0. Matrices
    whose rows are no whole blocks have another type. Vectors are F32. The file is rounded `by` a job or an importance
    matrix; without, in 3 to 5 bits, the embedding and the head are Q8_0. Mixtures of K-quants are made by llama.cpp
    itself from an F16 file. The file appears when it is complete. By default, the model's name in the metadata is the
    folder's. `progress` is called after every tensor. Errors as `layout_of`, `write_metadata` and `load_llama_cpp`.
    Some families are written by llama.cpp's own converter, and rounded by nothing (`convert`).
    """
    name = name or checkpoint.resolve().name
    if is_converted(checkpoint) and not by:
        kind, wide = convert(checkpoint, gguf_type=gguf_type, out=out, name=name, progress=progress)
        return Written(kind, out.stat().st_size, 0, wide)
    layout = layout_of(checkpoint, gguf_type)
    mixed = gguf_type in K_QUANTS and not (isinstance(by, Job) and gguf_type == "q6_k")  # which is uniform
    own_type: GgufType = "f16" if mixed else gguf_type
    parts = parts_of(checkpoint, layout, own_type, _weighed(checkpoint, by))
    if isinstance(by, Importance) and not any(part.tensor in by.squares for part in parts):
        raise InputError(f"{by.file}: got no matrix of {checkpoint}; allowed: an importance matrix of this model")
    if mixed or by or OF_GGML.intersection(part.kind for part in parts):
        load_llama_cpp(f"type {gguf_type}")  # fails before anything is written
    config: Any = AutoConfig.from_pretrained(checkpoint)
    with unfinished(out) as whole, tempfile.TemporaryDirectory(dir=out.parent) as folder:
        file, scratch = Path(folder) / "f16.gguf" if mixed else whole, Path(folder)
        if mixed and isinstance(by, Job):
            by = importance_of(by, checkpoint, scratch)
        writer = GGUFWriter(file, layout.name)
        write_metadata(writer, layout, config, checkpoint, name, own_type)
        if by:
            write_origin(writer, by, sum(len(part.shape) > 1 for part in parts))
        tensors = _tensors(checkpoint, layout, parts, by, scratch)
        if (factors := rope_factors(config, layout.structure.head_dim)) is not None:
            tensors.insert(0, ("rope_freqs.weight", factors.shape, Kind.F32, lambda: factors))
        write_file(writer, tensors, progress)
        if mixed:
            squares = {part.tensor: by.of(part) for part in parts} if isinstance(by, Importance) else {}
            requantise(file, gguf_type, whole, {name: own for name, own in squares.items() if own is not None})
    padded = (layout.channels - layout.structure.layer.channels) * layout.structure.depth
    kept_wider = sum(len(part.shape) > 1 and part.kind == WIDE for part in parts) if bits_of(own_type) < 16 else 0
    return Written(layout.name, out.stat().st_size, padded, kept_wider)


def _weighed(checkpoint: Path, by: Job | Importance | None) -> Container[str]:
    """The tensors whose inputs are weighed, of embedding and head."""
    if isinstance(by, Importance):
        return by.squares
    return (HEAD if "lm_head.weight" in written_shapes(checkpoint) else EMBEDDING,) if by else ()


def _tensors(
    checkpoint: Path, layout: Layout, parts: Sequence[Part], by: Job | Importance | None, scratch: Path
) -> list[GgufTensor]:
    """The tensors of a file; the values of each are read and rounded when they are asked for, one after another."""
    read = tensor_reader(weight_files(checkpoint))

    def plain(part: Part) -> Array:
        values = arranged(part.name, read(part.stored).to(torch.float32).numpy()[part.rows], layout)
        squares = by.of(part) if isinstance(by, Importance) else None
        by_ggml = squares is not None or part.kind in OF_GGML
        return quantise_rows(values, part.kind, squares) if by_ggml else quantize(values, part.kind)

    def tensor(part: Part, data: Callable[[], Array]) -> GgufTensor:
        return part.tensor, part.shape, part.kind, data

    if not isinstance(by, Job):
        return [tensor(part, partial(plain, part)) for part in parts]
    layers = by_layer(parts, layout)
    matrices = rounded_for(by, checkpoint, layout, layers, scratch)
    vectors = [tensor(part, partial(plain, part)) for part in parts if len(part.shape) == 1]
    return [*vectors, *(tensor(part, partial(next, matrices)) for part in chain.from_iterable(layers))]
