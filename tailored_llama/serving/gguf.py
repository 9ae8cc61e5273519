"""A checkpoint or an adapter as a GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio).

Every number is written and quantised by the package `gguf`. Layers that are all alike become the architecture of the
same name, or `llama`. Layers of different widths become `deci`, whose graph reads heads, key/value heads and widths of
each layer.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import load_file
from transformers import AutoConfig

from tailored_llama.config import K_QUANTS, GgufType
from tailored_llama.errors import InputError
from tailored_llama.files import unfinished
from tailored_llama.models import all_tensor_shapes, check_adapter, tensor_reader, weight_files
from tailored_llama.progress import Progress, silent
from tailored_llama.serving.gguf_layout import Layout, arranged, layout_of, moved, padded_shape, unfused, written_shapes
from tailored_llama.serving.gguf_metadata import rope_factors, write_metadata
from tailored_llama.serving.gguf_writing import Array, GgufTensor, write_file
from tailored_llama.serving.llama_cpp import load_llama_cpp, requantise

_WIDE = GGMLQuantizationType.F16  # of a matrix that is no whole blocks
_HEAD_NAMES = ("token_embd.weight", "output.weight")
# Whose adapter's matrix follows its weight in order and size: of outputs by its rows, of inputs by its columns.
_MOVED = {"lora_b": ("q_proj", "k_proj", "gate_proj", "up_proj"), "lora_a": ("down_proj",)}


@dataclass(frozen=True)
class Written:
    """A written GGUF file: its architecture, bytes, MLP channels added as padding, and matrices of a wider type."""

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
    model's name in the metadata is the folder's. `progress` is called after every tensor. Errors as `layout_of`,
    `write_metadata` and `load_llama_cpp`.
    """
    layout, k_quant = layout_of(checkpoint, gguf_type), gguf_type in K_QUANTS
    if k_quant:
        load_llama_cpp(f"type {gguf_type}")  # fails before anything is written
    own_type: GgufType = "f16" if k_quant else gguf_type
    config: Any = AutoConfig.from_pretrained(checkpoint)
    scratch: AbstractContextManager[str] = tempfile.TemporaryDirectory(dir=out.parent) if k_quant else nullcontext("")
    with unfinished(out) as part, scratch as folder:
        file = Path(folder) / "f16.gguf" if k_quant else part
        writer = GGUFWriter(file, layout.name)
        write_metadata(writer, layout, config, checkpoint, name or checkpoint.resolve().name, own_type)
        tensors = list(_tensors(checkpoint, layout, config, own_type))
        write_file(writer, tensors, progress)
        if k_quant:
            requantise(file, gguf_type, part)
    padded = sum(layer.channels for layer in layout.written) - sum(layer.channels for layer in layout.structure.layers)
    blocks = own_type not in ("f32", "f16", "bf16")
    kept_wider = sum(blocks and len(shape) > 1 and kind == _WIDE for _, shape, kind, _ in tensors)
    return Written(layout.name, out.stat().st_size, padded, kept_wider)


def _tensors(checkpoint: Path, layout: Layout, config: Any, gguf_type: GgufType) -> Iterator[GgufTensor]:
    """Every tensor of a file; its values are read and quantised when they are asked for."""
    read = tensor_reader(weight_files(checkpoint))

    def tensor(name: str, shape: tuple[int, ...], values: Callable[[], Array]) -> GgufTensor:
        kind = _tensor_type(name, shape, gguf_type)
        return name, shape, kind, lambda: quantize(values(), kind)

    def stored(name: str, part: str, rows: slice) -> Array:
        return arranged(part, read(name).to(torch.float32).numpy()[rows], layout)

    if (factors := rope_factors(config, layout.structure.head_dim)) is not None:
        yield tensor("rope_freqs.weight", factors.shape, lambda: factors)
    for name, shape in written_shapes(checkpoint).items():
        for part, rows in unfused(name, layout).items():
            dims = (len(range(*rows.indices(shape[0]))), *shape[1:])
            yield tensor(layout.tensor_name(part), padded_shape(part, dims, layout), partial(stored, name, part, rows))


def _tensor_type(name: str, shape: tuple[int, ...], gguf_type: GgufType) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[gguf_type.upper()]
    if name in _HEAD_NAMES and gguf_type[:2] in ("q4", "q5"):
        wanted = GGMLQuantizationType.Q8_0
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else _WIDE


def write_gguf_adapter(checkpoint: Path, adapter: Path, *, gguf_type: GgufType, out: Path) -> None:
    """Write a LoRA adapter, which llama.cpp loads beside the GGUF file of its checkpoint, of type `gguf_type`.

    Rows and columns follow that file: q and k in llama.cpp's rotary order, MLP channels padded to its blocks. `adapter`
    is a folder in PEFT's layout: LoRA or rsLoRA. Matrices are F32. `out` appears when it is complete. An `InputError`
    says that the adapter is broken or of another checkpoint, or that llama.cpp cannot express it.
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
    found = "DoRA" if config.get("use_dora") else kind
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(field):
            found = f"an adapter with {field}"
    if found != "LORA":
        merges = "it merges into its checkpoint: `tailored-llama merge`"
        hint = merges if kind == "LORA" else "serve it with transformers"
        raise InputError(f"adapter {adapter}: is {found}; allowed in GGUF: LoRA or rsLoRA ({hint})")
