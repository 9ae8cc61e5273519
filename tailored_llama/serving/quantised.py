"""What a type of fewer bits costs: a model scored with the weights that its GGUF file holds."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize

from tailored_llama.config import GgufType, Work
from tailored_llama.evaluation import read_metrics, score_benchmark
from tailored_llama.models import open_gguf, stored_dtype, weight_files, write_shards
from tailored_llama.serving.export import gguf_file
from tailored_llama.serving.gguf_layout import layout_of, restored, unfused, written_shapes
from tailored_llama.serving.settings import QuantisedSettings

_NOT_COPIED = ("manifest.json", "model.safetensors.index.json")


def score_quantised(
    checkpoint: Path, gguf: Path, prompts: Path, *, settings: QuantisedSettings, work: Work
) -> dict[str, Any]:
    """Stage: score the dequantised weights of a GGUF file as any checkpoint's.

    Only the scores are kept, as `score_benchmark` writes them; `metrics.json` also has the file's bytes. The forward
    passes are those of transformers, in the checkpoint's type. llama.cpp also rounds states to the type of the weights,
    which is not measured here. For a while, the folder that is written to also holds the dequantised checkpoint.

    The file was made from `checkpoint`, but for an adapter that was merged in.

    Raises:
        InputError: as `score_benchmark`.
    """
    file = gguf_file(gguf)
    with tempfile.TemporaryDirectory(dir=work.out) as scratch:
        dequantise(checkpoint, file, settings.type, dequantised := Path(scratch))
        measured = score_benchmark(dequantised, None, prompts, settings=settings.score, work=work)
    result = read_metrics(work.out) | {"type": settings.type, "bytes": file.stat().st_size}
    (work.out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    return measured


def dequantise(checkpoint: Path, file: Path, gguf_type: GgufType, out: Path) -> None:
    """Write a checkpoint with the weights of its GGUF file, in its own type and layout, to an existing empty folder.

    `write_gguf` has made `file` from a checkpoint of the same shapes, in the type `gguf_type`.
    """
    layout = layout_of(checkpoint, gguf_type)
    stored = {tensor.name: tensor for tensor in open_gguf(file, str(file)).tensors}
    shapes, dtype = written_shapes(checkpoint), stored_dtype(checkpoint)

    def read(name: str) -> torch.Tensor:
        parts = []
        for part, rows in unfused(name, layout).items():
            tensor = stored[layout.tensor_name(part)]
            shape = (len(range(*rows.indices(shapes[name][0]))), *shapes[name][1:])
            parts.append(restored(part, dequantize(tensor.data, tensor.tensor_type), shape, layout))
        return torch.from_numpy(np.concatenate(parts)).to(dtype)

    write_shards(out, shapes, dtype, read)
    weights = {path.name for path in weight_files(checkpoint)}
    for path in checkpoint.iterdir():
        if path.is_file() and path.name not in (*weights, *_NOT_COPIED):
            shutil.copyfile(path, out / path.name)
