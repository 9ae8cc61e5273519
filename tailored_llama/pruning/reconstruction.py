"""Reconstruction: fit the remaining weights, layer by layer, to the outputs of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailored_llama.config import Reconstruction
from tailored_llama.models import Forward, Shelf, caller, layers_of
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Slices
from tailored_llama.pruning.layerwise import enter_all, even_batches, inputs_of, observe
from tailored_llama.pruning.ridge import Equations

_PRUNED = "pruned"
_BLOCKS = (("self_attn", "o_proj"), ("mlp", "down_proj"))  # of a layer, with the projection that adds to the stream


@torch.inference_mode()
def reconstruct(
    model: Any,
    input_ids: Tensor,
    slices: list[Slices],
    kept: np.ndarray[Any, Any],
    method: Reconstruction,
    ridge: float,
    progress: Progress = silent,
    batch_tokens: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Fit the tensors of every layer, one layer at a time, and of the last norm.

    With W the dense weight [out, in] of an output projection, K the inputs that stay, X their activations [tokens, K]
    and Y the dense projection's outputs without bias [tokens, out], the new weight is the ridge solution pulled
    towards W_K:

        Ŵ = (Yᵀ X + λ W_K) (Xᵀ X + λ I)⁻¹,   λ = ridge · mean of the diagonal of Xᵀ X

    * `static`: X and Y come from the dense model. Nothing changes where nothing is removed.
    * `sequential`: X comes from the preceding layers, already pruned and fitted, and Y corrects their error. Y is the
      dense outputs plus the difference between the dense residual stream and the pruned one before the projection
      (He et al., arXiv 1707.06168, section 3.3). If a projection's outputs are normalised before they are added
      (Gemma 2 and 3), Y is the dense outputs alone. The projections that read the stream (q, k, v; gate, up) are
      fitted by the same equation to their dense outputs: with D their dense inputs, YᵀX = W DᵀX. Each weight of the
      last norm is multiplied by the solution for its channel alone, a scalar. Without this, the norm, which undoes
      any scale, would leave a damaged model as confident as the dense one.
    * `bias`: the weight is W_K; the mean output of the removed inputs is added to the bias (FLAP, arXiv 2312.11983).

    Of a block that leaves, no tensor is fitted. The pruned stream passes it unchanged, and the later fits of method
    `sequential` correct its absence; the other methods do not.

    Memory: the model, or one layer if it is streamed; the hidden states of the calibration tokens (twice for
    `sequential`) and one layer's outputs (for `sequential`, inputs too), which a streamed model also keeps on disk; and
    the normal equations, see `solver_memory`.

    Args:
        model: the dense causal LM, streamed or not; fitted weights are overwritten.
        input_ids: calibration tokens, int64 [samples, tokens].
        slices: which group owns which index of which parameter.
        kept: whether each group stays, bool [groups].
        method: `static`, `sequential` or `bias`.
        ridge: see above.
        progress: called after every layer.
        batch_tokens: most tokens per pass through one layer; None: 4,096.

    Yields:
        Tensors by name: weights [kept outputs, kept inputs] and biases [out], in the model's dtype.
    """
    stays = {(part.parameter, part.dim): torch.from_numpy(kept[part.owner]) for part in slices}
    layers, batches = layers_of(model), even_batches(input_ids, batch_tokens)
    with layers.shelf() as shelf:  # dense states by layer and batch, and what `_fit_in_sequence` keeps
        arguments = enter_all(model, batches, shelf)[0]
        if method == "sequential":
            for index in range(len(batches)):
                shelf[_PRUNED, index] = shelf[0, index]
        for number, layer in layers.forward():
            prefix = f"model.layers.{number}"
            modules = [(name, layer.get_submodule(name), out) for name, out in _BLOCKS]
            blocks = [
                _block(f"{prefix}.{name}", module, out, stays) for name, module, out in modules if hasattr(module, out)
            ]
            states = _States(shelf, number, len(batches))
            forward = caller(layer, arguments[number])
            if method == "sequential":
                adds_directly = not hasattr(layer, "post_feedforward_layernorm")
                tensors = _fit_in_sequence(forward, blocks, states, ridge, adds_directly)
                for name, module in (part for block in blocks if block.left for part in block.readers.items()):
                    rows = stays[f"{name}.weight", 0].to(module.weight.device)
                    tensors[f"{name}.weight"] = module.weight[rows]
            else:
                tensors = _fit_apart(forward, blocks, states, method, ridge)
            yield tensors
            states.drop()
            progress(number + 1, len(layers))
        if method == "sequential":
            yield {"model.norm.weight": _rescaled(model.model.norm, _States(shelf, len(layers), len(batches)), ridge)}


@dataclass(frozen=True)
class _States:
    """Hidden states before a layer, on a shelf: the dense model's and, for a sequential fit, the pruned model's."""

    shelf: Shelf
    number: int  # of the layer
    batches: int

    def dense(self, index: int) -> Tensor:
        return self.shelf[self.number, index]

    def pruned(self, index: int) -> Tensor:
        return self.shelf[_PRUNED, index]

    def drop(self) -> None:
        """Forget the dense states before the layer."""
        for index in range(self.batches):
            self.shelf.drop((self.number, index))


def _fit_apart(
    forward: Forward, blocks: list[_Block], states: _States, method: Reconstruction, ridge: float
) -> dict[str, Tensor]:
    """Fit each output projection on the dense model's activations."""
    fits = {block.name: _Fit(block.output, block.stays) for block in blocks if block.left}
    observers = {fit.module: fit.add if method == "static" else fit.add_mean for fit in fits.values()}
    for index in range(states.batches):
        states.shelf[states.number + 1, index] = observe(forward, observers, states.dense(index))
    tensors: dict[str, Tensor] = {}
    for name, fit in fits.items():
        if method == "static":
            fit.solve(ridge)
        else:
            fit.compensate()
        tensors |= fit.tensors(name)
    return tensors


def _fit_in_sequence(
    forward: Forward, blocks: list[_Block], states: _States, ridge: float, adds_directly: bool
) -> dict[str, Tensor]:
    """Fit all projections of a layer on the pruned model's activations, and run both models through the layer.

    `adds_directly` says whether the output projections add to the residual stream without a norm in between.

    Returns:
        The tensors of the output projections, by name; those of the others are in their modules.
    """
    shelf, batches, tensors = states.shelf, range(states.batches), dict[str, Tensor]()
    output_modules = [block.output for block in blocks]
    for index in batches:
        observers: dict[Any, Callable[[Tensor, Tensor], None]] = {}
        for block in blocks:
            observers[block.reader] = partial(_keep_inputs, shelf, (block.reader, index))
            observers[block.output] = partial(_keep_outputs, shelf, (block.output, index))
        shelf[states.number + 1, index] = observe(forward, observers, states.dense(index))
    for position, block in enumerate(blocks):  # in order: a block reads the fitted ones
        if not block.left:
            for parameter in block.output.parameters():
                parameter.zero_()  # so that it adds nothing to the pruned stream
            continue
        _fit_readers(forward, block, states, ridge)
        fit, before = _Fit(block.output, block.stays), output_modules[:position]
        for index in batches:
            batch = states.pruned(index)
            inputs, outputs = inputs_of(forward, fit.module, batch, before)
            target = shelf[fit.module, index].float()
            if adds_directly:
                dense, pruned = (each.to(target.device).float() for each in (states.dense(index), batch))
                target = target + dense - pruned
                for module, output in zip(before, outputs, strict=True):
                    target += shelf[module, index].float() - output.float()
            fit.add(inputs, target)
        fit.solve(ridge)
        tensors |= fit.tensors(block.name)
    for index in batches:
        shelf[_PRUNED, index] = forward(states.pruned(index))
        for block in blocks:
            shelf.drop((block.reader, index))
            shelf.drop((block.output, index))
    return tensors


def _keep_inputs(shelf: Shelf, key: Hashable, inputs: Tensor, outputs: Tensor) -> None:
    shelf[key] = inputs


def _keep_outputs(shelf: Shelf, key: Hashable, inputs: Tensor, outputs: Tensor) -> None:
    shelf[key] = outputs


def _fit_readers(forward: Forward, block: _Block, states: _States, ridge: float) -> None:
    """Fit the projections that read the residual stream, in place; they share their inputs, and so the equations."""
    width, device = block.reader.in_features, block.reader.weight.device
    equations = Equations(width, width, device)
    for index in range(states.batches):
        inputs, _ = inputs_of(forward, block.reader, states.pruned(index), [])
        equations.add(inputs, states.shelf[block.reader, index])
    transfer = torch.empty(width, width, device=device)
    equations.solve(torch.eye(width, device=device), ridge, transfer)
    for module in block.readers.values():
        module.weight.copy_(module.weight.float() @ transfer)


def _rescaled(norm: Any, states: _States, ridge: float) -> Tensor:
    """Weights [hidden] that fit a norm's outputs for the pruned states to its outputs for the dense ones."""
    squares = torch.zeros(norm.weight.shape, dtype=torch.float64, device=norm.weight.device)
    products = torch.zeros_like(squares)
    for index in range(states.batches):
        target, output = (
            norm(hidden).flatten(0, -2).double() for hidden in (states.dense(index), states.pruned(index))
        )
        squares += output.square().sum(0)
        products += (output * target).sum(0)
    strength = ridge * squares.mean()
    base = 1 if type(norm).__name__.startswith("Gemma") else 0  # Gemma's norms multiply by 1 + weight
    weight: Tensor = (norm.weight.double() + base) * (products + strength) / (squares + strength) - base
    return weight.to(norm.weight.dtype)


@dataclass(frozen=True)
class _Block:
    """Attention or MLP of a layer: the projections that read the residual stream, and the one that adds to it."""

    name: str  # of the output projection
    output: Any
    stays: Tensor  # which of its inputs, bool [in]
    readers: dict[str, Any]  # all have the same inputs

    @property
    def left(self) -> bool:
        """Whether any of it stays."""
        return bool(self.stays.any())

    @property
    def reader(self) -> Any:
        return next(iter(self.readers.values()))


def _block(name: str, block: Any, output: str, stays: dict[tuple[str, int], Tensor]) -> _Block:
    linear = {f"{name}.{child}": part for child, part in block.named_children() if isinstance(part, torch.nn.Linear)}
    module = linear.pop(f"{name}.{output}")
    return _Block(f"{name}.{output}", module, stays[f"{name}.{output}.weight", 1].to(module.weight.device), linear)


class _Fit:
    """An output projection and the fit of its remaining weights."""

    def __init__(self, module: Any, stays: Tensor) -> None:
        self.module, self.stays = module, stays  # bool [in]
        self.equations = Equations(len(module.weight), int(stays.sum()), stays.device)
        self.total = torch.zeros(len(stays), dtype=torch.float64, device=stays.device)  # sum of inputs
        self.tokens = 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add inputs [samples, tokens, in] and their target outputs [samples, tokens, out]."""
        if self.module.bias is not None:
            outputs = outputs.float() - self.module.bias.float()
        self.equations.add(inputs[..., self.stays], outputs)

    def add_mean(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add inputs [samples, tokens, in] to the mean alone."""
        self.total += inputs.flatten(0, -2).double().sum(0)
        self.tokens += inputs[..., 0].numel()

    def solve(self, ridge: float) -> None:
        """Write the ridge solution into the module, with zeros for removed inputs."""
        weight = self.module.weight[:, self.stays]
        self.equations.solve(weight, ridge, weight)
        self.module.weight.zero_()
        self.module.weight[:, self.stays] = weight

    def compensate(self) -> None:
        """Add the mean output of the removed inputs to the module's bias."""
        mean = self.total / self.tokens
        lost = self.module.weight[:, ~self.stays].double() @ mean[~self.stays]
        before = 0 if self.module.bias is None else self.module.bias.double()
        self.module.bias = torch.nn.Parameter((before + lost).to(self.module.weight.dtype), requires_grad=False)
        self.module.weight[:, ~self.stays] = 0

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of this projection in the pruned checkpoint, by name."""
        tensors = {f"{name}.weight": self.module.weight[:, self.stays].contiguous()}
        if self.module.bias is not None:
            tensors[f"{name}.bias"] = self.module.bias.data
        return tensors
