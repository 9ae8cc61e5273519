"""A training in several processes, one on each GPU of the machine, by torch's FSDP2 (arXiv 2304.11277).

Each process holds a part of every weight, and of its optimiser's state, and computes a part of the samples of a step.
A layer's weights are whole while it is computed. In a single process, the functions on parts do nothing.

accelerate 1.15 wraps torch's `fully_shard` too, but not on a CPU, so nothing could be tested without GPUs. It frees the
weights of the head after a forward pass, but training on packed rows runs the head on its own, and again backwards.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tailored_llama.config import Work
from tailored_llama.memory import ran_out
from tailored_llama.models import batches, devices_of
from tailored_llama.processes import run_processes
from tailored_llama.progress import Progress, silent

K = TypeVar("K")
T = TypeVar("T")
Train = Callable[[Work], dict[str, Any]]  # it can be pickled

_HALVINGS = 5  # of the tokens a pass, before a training that runs out of memory is given up


def in_processes(train: Train, work: Work) -> dict[str, Any]:
    """Run a training here, or with device `balanced` in one process on each GPU; returns what it measured.

    The processes end with this one, and raise what `run_processes` does. When memory runs out in one of them, all start
    again with half the tokens a pass, from the last saved state.
    """
    if work.execution.device != "balanced":
        return train(work)
    devices = devices_of(work.execution.device)
    while True:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                arguments = (devices, Path(scratch), train, replace(work, progress=silent))
                return run_processes(_member, arguments, work.progress, count=len(devices))
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error) or work.halvings == _HALVINGS:
                raise
        work = replace(work, halvings=work.halvings + 1)
        part = 2**work.halvings
        logging.getLogger(__name__).warning("memory ran out: starting again with 1/%d of the tokens a pass", part)


def _member(
    rank: int, progress: Progress, devices: list[str], scratch: Path, train: Train, work: Work
) -> dict[str, Any]:
    """One of the processes. They all do the same; what the first one writes and reports is kept."""
    device = torch.device(devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))
    (out := scratch / str(rank)).mkdir()
    execution = work.execution.model_copy(update={"device": "cpu"})  # until the weights are shared out
    work = replace(work, out=out if rank else work.out, execution=execution, progress=progress)
    backend, meeting = "nccl" if device.type == "cuda" else "gloo", f"file://{scratch / 'meeting'}"
    distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=len(devices))
    facts = train(work)
    distributed.destroy_process_group()
    return facts


def rank_and_count() -> tuple[int, int]:
    """The number of this process, and how many train together."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


class _Root(torch.nn.Module):
    """The module that FSDP wraps: the weights outside the layers are gathered where its forward pass begins."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(self.model, *arguments)


def share_out(model: Any, precision: str) -> Callable[..., Any]:
    """Share the weights of a causal LM, or of a PEFT model, out to the processes; they hold the same.

    If all weights are trained, they are gathered in the precision of the products: autocast would keep a copy of each.

    Returns:
        What calls a function with the model and further arguments. All that computes with the model is called through
        it, equally often by all processes.
    """
    _, count = rank_and_count()
    root = _Root(model)
    if count == 1:
        return root.forward
    mesh = init_device_mesh("cuda" if distributed.get_backend() == "nccl" else "cpu", (count,))
    products = torch.bfloat16 if precision == "bfloat16" and not hasattr(model, "get_base_model") else None
    policy = MixedPrecisionPolicy(products, torch.float32 if products else None, cast_forward_inputs=False)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return root


def passes(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """This process's part of samples, by index, in passes of at most `budget` tokens, but at least one sample.

    Every process has as many passes as the one with the most, since they compute each layer together; some are empty.
    """
    rank, count = rank_and_count()
    dealt = [range(number, len(lengths), count) for number in range(count)]
    parts = [[[mine[i] for i in part] for part in batches([lengths[i] for i in mine], budget)] for mine in dealt]
    return parts[rank] + [[]] * (max(map(len, parts)) - len(parts[rank]))


def gathered(values: dict[K, T]) -> dict[K, T]:
    """Gather what all processes have; all of them call this."""
    parts = [values] * rank_and_count()[1]
    if len(parts) > 1:
        distributed.all_gather_object(parts, values)
    return {key: value for part in parts for key, value in part.items()}


def trained(model: Any) -> dict[str, Tensor]:
    """The parameters that are trained, by name; each may be a part of a whole one."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """The tensor that all processes have parts of; all of them call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


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
        owner, _, attribute = name.rpartition(".")
        if isinstance(parameter, DTensor):
            model.get_submodule(owner).register_parameter(attribute, torch.nn.Parameter(whole(parameter)))


def put(model: Any, weights: dict[str, Tensor]) -> None:
    """Set trained parameters, by name, to whole tensors."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(part_like(weights[name], parameter))
