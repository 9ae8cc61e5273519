"""A GGUF file that is rounded for a job: by what the job's prompts put into each matrix of the model."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from gguf.quants import dequantize
from torch import Tensor
from torch.nn.functional import pad

from tailored_llama.config import ExecutionConfig
from tailored_llama.data import encode_prompt, read_prompts
from tailored_llama.models import Document, layer_moments, load_tokenizer, open_model, read_config
from tailored_llama.serving.gguf_layout import Layout, Part, arranged, layout_of, parts_of, restored
from tailored_llama.serving.gguf_writing import Array
from tailored_llama.serving.imatrix import Importance
from tailored_llama.serving.llama_cpp import quantise_rows
from tailored_llama.serving.rounding import rounded

_LAYER = r"model\.layers\.(\d+)\."
_TOKENS = 2**14  # of the prompts that are read, about


@dataclass(frozen=True)
class Job:
    """Prompts as tokens, with all their choices; what they are called; and how they are read."""

    dataset: str
    documents: Sequence[Document]
    execution: ExecutionConfig


def job_of(checkpoint: Path, prompts: Mapping[str, Path], execution: ExecutionConfig) -> Job | None:
    """The job of rendered prompts by benchmark: the first ones to tune on of each; None if there are none."""
    tokenizer, longest = load_tokenizer(checkpoint), int(read_config(checkpoint)["max_position_embeddings"])
    of_each = [read_prompts(folder, "shots") + read_prompts(folder, "held_out") for folder in prompts.values()]
    documents, tokens = list[Document](), 0
    for prompt in filter(None, chain.from_iterable(zip_longest(*of_each))):
        if tokens < _TOKENS:
            documents.append(encode_prompt(tokenizer, prompt, longest).document)
            tokens += len(documents[-1])
    return Job(", ".join(prompts), documents, execution) if documents else None


def by_layer(parts: Sequence[Part], layout: Layout) -> list[list[Part]]:
    """The matrices of every layer; last, the embedding and the head."""
    groups: list[list[Part]] = [[] for _ in range(layout.structure.depth + 1)]
    for part in parts:
        if len(part.shape) > 1:
            found = re.match(_LAYER, part.stored)
            groups[int(found[1]) if found else -1].append(part)
    return groups


@torch.inference_mode()
def rounded_for(
    job: Job, checkpoint: Path, layout: Layout, groups: Sequence[Sequence[Part]], scratch: Path
) -> Iterator[Array]:
    """The bytes of all matrices, layer by layer. Each layer is rounded for what it reads of those before it.

    A tied embedding is rounded for its inputs as the head. If the head is a matrix of its own, the embedding is rounded
    plainly.
    """
    for part, module, inputs in _read(job, checkpoint, groups, scratch):
        weight = module.get_parameter(_within(part)).data[part.rows]
        values = arranged(part.name, weight.float().cpu().numpy(), layout)
        data = quantise_rows(values, part.kind) if inputs is None else rounded(values, part.kind, inputs)
        yield data
        if re.match(_LAYER, part.stored):
            became = restored(part.name, dequantize(data, part.kind), tuple(weight.shape), layout)
            weight.copy_(torch.from_numpy(became))


@torch.inference_mode()
def importance_of(job: Job, checkpoint: Path, scratch: Path) -> Importance:
    """The importance matrix of a job for the model as it is, which is what llama.cpp's own tool measures."""
    layout, squares = layout_of(checkpoint), dict[str, Array]()
    groups = by_layer(parts_of(checkpoint, layout, "f16"), layout)
    for part, _, inputs in _read(job, checkpoint, groups, scratch):
        if inputs is not None:
            squares[part.tensor] = inputs.diagonal().cpu().contiguous().numpy()
    return Importance(job.dataset, len(job.documents), squares)


def _read(
    job: Job, checkpoint: Path, groups: Sequence[Sequence[Part]], scratch: Path
) -> Iterator[tuple[Part, Any, Tensor | None]]:
    """Every matrix, the layer or model that has it, and the moments of what it is given, padded as it is."""
    model = open_model(checkpoint, job.execution, scratch)
    layers = layer_moments(model, job.documents, job.execution.batch_tokens)
    for parts, (module, moments) in zip(groups, layers, strict=True):
        for part in parts:  # a tied head's are those of the head
            found = moments.get("lm_head" if len(parts) == 1 else _within(part).removesuffix(".weight"))
            yield part, module, None if found is None else pad(found, 2 * (0, part.shape[1] - len(found)))


def _within(part: Part) -> str:
    """The name of its tensor in its layer, or else in the model."""
    return re.sub(_LAYER, "", part.stored)
