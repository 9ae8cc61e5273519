"""The writing of GGUF files: tensor by tensor, and complete or not at all."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A path beside that of a file, whose place it takes once the block has ended without an error."""
    part = out.with_name(f"{out.name}.part")
    try:
        yield part
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


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
