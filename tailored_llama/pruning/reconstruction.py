"""Reconstruction: fit the remaining weights, layer by layer, to the outputs of the dense model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear

from tailored_llama.config import ReconstructionConfig
from tailored_llama.models import Forward, Shelf, caller, layers_of
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Stays
from tailored_llama.pruning.layerwise import Seen, Text, enter_all, inputs_of, watching
from tailored_llama.pruning.ridge import Equations

_PRUNED = "pruned"
_BLOCKS = (("self_attn", "o_proj"), ("mlp", "down_proj"))  # of a layer, with the projection that adds to the stream


@torch.inference_mode()
def reconstruct(
    model: Any, text: Text, stays: Stays, reconstruction: ReconstructionConfig, progress: Progress = silent
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
    the normal equations, see `solver_bytes`.

    Args:
        model: the dense causal LM, streamed or not; fitted weights are overwritten.
        text: the calibration text.
        stays: the output of `staying`.
        reconstruction: the method, and the ridge.

    Yields:
        Tensors by name: weights [kept outputs, kept inputs] and biases [out], in the model's dtype.
    """
    method, ridge = reconstruction.method, reconstruction.ridge
    layers, batches = layers_of(model), text.even_batches()
    with layers.shelf() as shelf:  # dense states by layer and batch, pruned ones by batch
        arguments = enter_all(model, batches, shelf)[0]
        if method == "sequential":
            for index in range(len(batches)):
                shelf[_PRUNED, index] = shelf[0, index]
        for number, module in layers.forward():
            blocks = _blocks(module, f"model.layers.{number}", stays)
            adds_directly = not hasattr(module, "post_feedforward_layernorm")
            forward = caller(module, arguments[number])
            layer = _Layer(number, blocks, adds_directly, forward, shelf, range(len(batches)))
            if method == "bias":
                yield _fit_bias(layer, text.input_ids.numel())
            else:
                yield (_fit_static if method == "static" else _fit_sequentially)(layer, ridge)
            for index in layer.batches:
                shelf.drop((number, index))
            progress(number + 1, len(layers))
        if method == "sequential":
            pairs = ((shelf[len(layers), index], shelf[_PRUNED, index]) for index in range(len(batches)))
            yield {"model.norm.weight": _fit_norm(model.model.norm, pairs, ridge)}


@dataclass(frozen=True, eq=False)
class _Block:
    """Attention or MLP of a layer: the projections that read the residual stream, and the one that adds to it."""

    name: str  # of the output projection
    output: Any
    stays: Tensor  # which of its inputs, bool [in]
    readers: dict[str, Any]  # by name; all have the same inputs
    rows: dict[str, Tensor]  # which outputs of each reader stay, bool [out]

    @property
    def reader(self) -> Any:
        return next(iter(self.readers.values()))

    def equations(self) -> Equations:
        """The equations of the output projection, without any tokens."""
        return Equations(len(self.output.weight), int(self.stays.sum()), self.stays.device)

    def add(self, equations: Equations, inputs: Tensor, outputs: Tensor) -> None:
        """Add inputs [samples, tokens, in] of the output projection and target outputs [samples, tokens, out]."""
        if self.output.bias is not None:
            outputs = outputs.float() - self.output.bias.float()
        equations.add(inputs[..., self.stays], outputs)

    def solve(self, equations: Equations, ridge: float) -> None:
        """Write the ridge solution into the output projection, with zeros for removed inputs."""
        weight = self.output.weight[:, self.stays]
        equations.solve(weight, ridge)
        self.output.weight.zero_()
        self.output.weight[:, self.stays] = weight


@dataclass(frozen=True)
class _Layer:
    """A layer at work: its blocks, and the hidden states before it, of the dense model and of the pruned one."""

    number: int
    blocks: list[_Block]
    adds_directly: bool  # whether output projections add to the residual stream without a norm in between
    forward: Forward
    shelf: Shelf
    batches: range

    @property
    def left(self) -> list[_Block]:
        """The blocks of which any part stays."""
        return [block for block in self.blocks if block.stays.any()]

    def run_dense(self) -> Iterator[tuple[int, dict[Any, Seen]]]:
        """Run the dense model's states through the layer; yield what its projections read and wrote, by batch."""
        modules = [module for block in self.blocks for module in (block.reader, block.output)]
        for index in self.batches:
            with watching(modules) as seen:
                self.shelf[self.number + 1, index] = self.forward(self.shelf[self.number, index])
            yield index, seen

    def output_tensors(self) -> dict[str, Tensor]:
        """Weights and biases of the output projections in the pruned checkpoint, by name."""
        tensors: dict[str, Tensor] = {}
        for block in self.left:
            tensors[f"{block.name}.weight"] = block.output.weight[:, block.stays].contiguous()
            if block.output.bias is not None:
                tensors[f"{block.name}.bias"] = block.output.bias.data
        return tensors


def _blocks(layer: Any, prefix: str, stays: Stays) -> list[_Block]:
    """The blocks that a layer has, attention first."""

    def mask(name: str, dim: int, like: Any) -> Tensor:
        return torch.from_numpy(stays[f"{name}.weight", dim]).to(like.weight.device)

    blocks = []
    for parent, output in _BLOCKS:
        module = layer.get_submodule(parent)
        linear = {f"{prefix}.{parent}.{name}": m for name, m in module.named_children() if isinstance(m, Linear)}
        if projection := linear.pop(name := f"{prefix}.{parent}.{output}", None):
            rows = {reader: mask(reader, 0, m) for reader, m in linear.items()}
            blocks.append(_Block(name, projection, mask(name, 1, projection), linear, rows))
    return blocks


def _fit_static(layer: _Layer, ridge: float) -> dict[str, Tensor]:
    """Fit each output projection on the dense model's activations."""
    equations = {block: block.equations() for block in layer.left}
    for _, seen in layer.run_dense():
        for block, own in equations.items():
            block.add(own, *seen[block.output])
    for block, own in equations.items():
        block.solve(own, ridge)
    return layer.output_tensors()


def _fit_bias(layer: _Layer, tokens: int) -> dict[str, Tensor]:
    """Add the mean output of the removed inputs, over all tokens, to each output projection's bias."""
    sums = {block: torch.zeros_like(block.stays, dtype=torch.float64) for block in layer.left}
    for _, seen in layer.run_dense():
        for block, total in sums.items():
            total += seen[block.output].inputs.flatten(0, -2).double().sum(0)
    for block, total in sums.items():
        module, gone = block.output, ~block.stays
        lost = module.weight[:, gone].double() @ (total / tokens)[gone]
        before = 0 if module.bias is None else module.bias.double()
        module.bias = torch.nn.Parameter((before + lost).to(module.weight.dtype), requires_grad=False)
        module.weight[:, gone] = 0
    return layer.output_tensors()


def _fit_sequentially(layer: _Layer, ridge: float) -> dict[str, Tensor]:
    """Fit all projections on the pruned model's activations, and run both models through the layer."""
    shelf = layer.shelf
    for index, seen in layer.run_dense():
        for block in layer.blocks:
            shelf[block.reader, index] = seen[block.reader].inputs
            shelf[block.output, index] = seen[block.output].outputs
    for position, block in enumerate(layer.blocks):  # in order: a block reads what the fitted ones before it add
        if block.stays.any():
            _fit_readers(layer, block, ridge)
            _fit_output(layer, block, layer.blocks[:position], ridge)
        else:
            for parameter in block.output.parameters():
                parameter.zero_()  # so that it adds nothing to the pruned stream
    for index in layer.batches:
        shelf[_PRUNED, index] = layer.forward(shelf[_PRUNED, index])
        for block in layer.blocks:
            shelf.drop((block.reader, index))
            shelf.drop((block.output, index))
    return layer.output_tensors() | {
        f"{name}.weight": module.weight[block.rows[name]]
        for block in layer.left
        for name, module in block.readers.items()
    }


def _fit_readers(layer: _Layer, block: _Block, ridge: float) -> None:
    """Fit the projections that read the residual stream; they share their inputs, and so the equations."""
    width, device = block.reader.in_features, block.reader.weight.device
    equations = Equations(width, width, device)
    for index in layer.batches:
        inputs, _ = inputs_of(layer.forward, block.reader, layer.shelf[_PRUNED, index], [])
        equations.add(inputs, layer.shelf[block.reader, index])
    transfer = torch.eye(width, device=device)
    equations.solve(transfer, ridge)
    for module in block.readers.values():
        module.weight.copy_(module.weight.float() @ transfer)


def _fit_output(layer: _Layer, block: _Block, before: list[_Block], ridge: float) -> None:
    """Fit the projection that adds to the residual stream, with the stream's error as part of its target."""
    equations, shelf = block.equations(), layer.shelf
    for index in layer.batches:
        states, earlier = shelf[_PRUNED, index], [each.output for each in before]
        inputs, outputs = inputs_of(layer.forward, block.output, states, earlier)
        target = shelf[block.output, index].float()
        if layer.adds_directly:
            dense, pruned = (each.to(target.device).float() for each in (shelf[layer.number, index], states))
            target = target + dense - pruned
            for module, output in zip(earlier, outputs, strict=True):
                target += shelf[module, index].float() - output.float()
        block.add(equations, inputs, target)
    block.solve(equations, ridge)


def _fit_norm(norm: Any, states: Iterable[tuple[Tensor, Tensor]], ridge: float) -> Tensor:
    """Weights [hidden] that fit a norm's outputs for the pruned states to its outputs for the dense ones.

    `states`: of every batch, dense and pruned.
    """
    squares = torch.zeros(norm.weight.shape, dtype=torch.float64, device=norm.weight.device)
    products = torch.zeros_like(squares)
    for pair in states:
        target, output = (norm(hidden).flatten(0, -2).double() for hidden in pair)
        squares += output.square().sum(0)
        products += (output * target).sum(0)
    strength = ridge * squares.mean()
    base = 1 if type(norm).__name__.startswith("Gemma") else 0  # Gemma's norms multiply by 1 + weight
    weight: Tensor = (norm.weight.double() + base) * (products + strength) / (squares + strength) - base
    return weight.to(norm.weight.dtype)
