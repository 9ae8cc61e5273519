"""A model shared out to several processes that train it together, by torch's FSDP2 (arXiv 2304.11277).

Each process holds a part of every weight, and of its optimiser's state, and computes a part of the samples of a step.
A layer's weights are whole while it is computed. In a single process, the functions here do nothing.

This is torch's own `fully_shard`, which accelerate wraps. accelerate 1.15 does not do so on a CPU, so nothing could be
tested without GPUs. It also puts embedding and head into a group whose weights are freed after a forward pass of both,
but training on packed rows runs the head on its own, and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tailored_llama.models import batches

K = TypeVar("K")
T = TypeVar("T")


def rank_and_count() -> tuple[int, int]:
    """The number of this process, and how many train together."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


class _Root(torch.nn.Module):
    """What FSDP wraps: it gathers the weights outside the layers where this module's forward pass begins."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(self.model, *arguments)


def share_out(model: Any, precision: str) -> Callable[..., Any]:
    """Share the weights of a causal LM, or of a PEFT model, out to the processes; they hold the same.

    If all weights are trained, they are gathered in the precision of the products: autocast would keep a copy of each.

    Returns:
        What calls a function with the model and further arguments. All processes call it equally often, and all
        functions that compute with the model are called through it.
    """
    _, count = rank_and_count()
    if count == 1:
        return lambda function, *arguments: function(model, *arguments)
    mesh, root = init_device_mesh("cuda" if distributed.get_backend() == "nccl" else "cpu", (count,)), _Root(model)
    products = torch.bfloat16 if precision == "bfloat16" and not hasattr(model, "get_base_model") else None
    policy = MixedPrecisionPolicy(products, torch.float32 if products else None, cast_forward_inputs=False)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return root


def passes(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """This process's part of samples, by index, in passes of at most `budget` tokens, but at least one sample.

    Every process has as many passes as the one with the most, since they compute each layer together. A pass that has
    no sample of its own is empty.
    """
    own, count = rank_and_count()
    dealt = [range(number, len(lengths), count) for number in range(count)]
    parts = [[[mine[i] for i in part] for part in batches([lengths[i] for i in mine], budget)] for mine in dealt]
    return parts[own] + [[]] * (max(map(len, parts)) - len(parts[own]))


def gathered(own: dict[K, T]) -> dict[K, T]:
    """What all processes have, together; all of them call this."""
    parts = [own] * rank_and_count()[1]
    if len(parts) > 1:
        distributed.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def trained(model: Any) -> dict[str, Tensor]:
    """The parameters that are trained, by name; each may be a part of a whole one."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """The tensor that all processes have parts of; all of them call this."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach()


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of `like`; a tensor of another shape has no parts."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def on_first(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process; the others call this and get nothing."""
    tensors = {}
    for name, part in parts.items():
        tensor = whole(part)  # which all take part in
        if rank_and_count()[0] == 0:
            tensors[name] = tensor.cpu()
    return tensors


def gather(model: Any) -> None:
    """Put whole tensors in place of the parts of an adapter, so that it can be saved."""
    for name, parameter in trained(model).items():
        owner, _, own = name.rpartition(".")
        if isinstance(parameter, DTensor):
            model.get_submodule(owner).register_parameter(own, torch.nn.Parameter(whole(parameter)))


def put(model: Any, weights: dict[str, Tensor]) -> None:
    """Set trained parameters, by name, to whole tensors."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(part_like(weights[name], parameter))
