"""The writing of GGUF files: tensor by tensor, and complete or not at all."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape

from tailored_llama.progress import Progress, silent

Array = npt.NDArray[Any]
GgufTensor = tuple[str, tuple[int, ...], GGMLQuantizationType, Callable[[], Array]]  # name, shape, type, how to read


def gguf_file(folder: Path) -> Path:
    """The GGUF file in a folder that `export_gguf` wrote."""
    return next(folder.glob("*.gguf"))


def write_file(writer: GGUFWriter, tensors: Sequence[GgufTensor], progress: Progress = silent) -> None:
    """Write the metadata that a writer has, then the tensors; `progress` is called after each of them."""
    try:
        for name, shape, kind, _ in tensors:
            byte_shape = quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), math.prod(byte_shape), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (*_, data) in enumerate(tensors, 1):
            writer.write_tensor_data(data().view(np.uint8))
            progress(done, len(tensors))
    finally:
        writer.close()
