"""Importance matrices in llama.cpp's own format (`llama-imatrix`): the mean square of every input of a matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType

from tailored_llama.errors import InputError
from tailored_llama.files import unfinished
from tailored_llama.models import open_gguf
from tailored_llama.serving.gguf_layout import Part
from tailored_llama.serving.gguf_writing import Array, GgufTensor, write_file

_SUMS, _COUNTS, _CHUNKS, _DATASETS = ".in_sum2", ".counts", "imatrix.chunk_count", "imatrix.datasets"


@dataclass(frozen=True)
class Importance:
    """Mean squares by the name of the tensor in GGUF, of a text of so many chunks; and its file's name, if any."""

    dataset: str
    chunks: int
    squares: Mapping[str, Array]
    file: str = ""

    def of(self, part: Part) -> Array | None:
        """Those of a matrix, if it has them, padded as it is; an `InputError` if it has another number of inputs."""
        if (found := self.squares.get(part.tensor)) is None:
            return None
        if len(found) != part.inputs:
            name = f"{self.file}: {part.tensor}"
            raise InputError(f"{name}: got {len(found)} inputs; allowed: {part.inputs}, as in the checkpoint")
        return np.pad(found, (0, part.shape[-1] - part.inputs))


def write_importance(importance: Importance, out: Path) -> None:
    """Write a file that llama.cpp reads (`llama-quantize --imatrix`); it appears when it is complete."""
    tensors: list[GgufTensor] = []
    for name, squares in importance.squares.items():
        for suffix, values in ((_SUMS, squares[None]), (_COUNTS, np.ones((1, 1)))):
            data = np.float32(importance.chunks) * values.astype(np.float32)
            tensors.append((name + suffix, data.shape, GGMLQuantizationType.F32, data.copy))
    with unfinished(out) as part:
        writer = GGUFWriter(part, "imatrix")
        writer.add_type("imatrix")
        writer.add_array(_DATASETS, [importance.dataset])
        writer.add_uint32(_CHUNKS, importance.chunks)
        writer.add_uint32("imatrix.chunk_size", 1)
        write_file(writer, tensors)


def read_importance(file: Path) -> Importance:
    """Read a file of `llama-imatrix`, or of `write_importance`; an `InputError` if it is none."""
    reader = open_gguf(file, str(file))
    tensors = {tensor.name: np.asarray(tensor.data).reshape(-1) for tensor in reader.tensors}
    squares = dict[str, Array]()
    for name in [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]:
        sums, counts = tensors[name + _SUMS], tensors.get(name + _COUNTS, np.zeros(1, np.float32))
        kinds = {sums.dtype, counts.dtype} == {np.dtype(np.float32)}
        if not (kinds and len(counts) == 1 and counts[0] > 0 and np.isfinite(sums).all() and (sums >= 0).all()):
            raise InputError(f"{file}: {name}: got no mean squares of inputs; allowed: a file of llama-imatrix")
        squares[name] = sums / counts[0]
    if not squares:
        raise InputError(f"{file}: got no importance matrix; allowed: a file of llama-imatrix (.gguf)")
    datasets, chunks = (reader.fields.get(key) for key in (_DATASETS, _CHUNKS))
    named = datasets.contents() if datasets else []
    return Importance(", ".join(map(str, named)), int(chunks.contents()) if chunks else 0, squares, file.name)
