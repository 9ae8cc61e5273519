"""Reconstruction: fit the remaining weights, layer by layer, to the outputs of the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailored_llama.config import Reconstruction
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Slices
from tailored_llama.pruning.layerwise import Forward, caller, first_layer_inputs, inputs_of, observe

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

    Memory: the model, the hidden states of the calibration tokens (twice for `sequential`), and one layer's outputs
    (for `sequential`, inputs too) and normal equations.

    Args:
        model: the dense causal LM; fitted weights are overwritten.
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
    stays = {(part.parameter, part.dim): torch.from_numpy(kept[part.owner]).to(model.device) for part in slices}
    layers = model.model.layers
    states, arguments = first_layer_inputs(model, input_ids, batch_tokens)
    pruned = states
    for number, layer in enumerate(layers):
        blocks = [_block(f"model.layers.{number}.{name}", layer.get_submodule(name), out) for name, out in _BLOCKS]
        fits = [_Fit(block.output, stays[f"{block.name}.weight", 1]) for block in blocks]
        forward = caller(layer, arguments[number])
        tensors: dict[str, Tensor] = {}
        if method == "sequential":
            adds_directly = not hasattr(layer, "post_feedforward_layernorm")
            states, pruned = _fit_in_sequence(forward, blocks, fits, states, pruned, ridge, adds_directly)
            readers = {f"{name}.weight": module for block in blocks for name, module in block.readers.items()}
            tensors = {name: module.weight[stays[name, 0]] for name, module in readers.items()}
        else:
            states = _fit_apart(forward, fits, states, method, ridge)
        for block, fit in zip(blocks, fits, strict=True):
            tensors |= fit.tensors(block.name)
        yield tensors
        progress(number + 1, len(layers))
    if method == "sequential":
        yield {"model.norm.weight": _rescaled(model.model.norm, states, pruned, ridge)}


def _fit_apart(
    forward: Forward, fits: list[_Fit], states: list[Tensor], method: Reconstruction, ridge: float
) -> list[Tensor]:
    """Fit each output projection on the dense model's activations; return the states after the layer."""
    by_module = {fit.module: fit for fit in fits}
    if method == "static":
        after = observe(forward, list(by_module), states, lambda module, x, y: by_module[module].add(x, y))
        for fit in fits:
            fit.solve(ridge)
    else:
        after = observe(forward, list(by_module), states, lambda module, x, y: by_module[module].add_mean(x))
        for fit in fits:
            fit.compensate()
    return after


def _fit_in_sequence(
    forward: Forward,
    blocks: list[_Block],
    fits: list[_Fit],
    states: list[Tensor],
    pruned: list[Tensor],
    ridge: float,
    adds_directly: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Fit all projections of a layer on the pruned model's activations; return both models' states after the layer.

    `adds_directly` says whether the output projections add to the residual stream without a norm in between.
    """
    output_modules = [block.output for block in blocks]
    dense: dict[Any, list[Tensor]] = {module: [] for block in blocks for module in (block.reader, block.output)}
    after = observe(
        forward, list(dense), states, lambda module, x, y: dense[module].append(y if module in output_modules else x)
    )
    for position, (block, fit) in enumerate(zip(blocks, fits, strict=True)):  # in order: a block reads the fitted ones
        equations = _Equations(block.reader.in_features, block.reader.in_features, fit.stays.device)
        for number, batch in enumerate(pruned):
            equations.add(inputs_of(forward, block.reader, batch, [])[0], dense[block.reader][number])
        transfer = equations.solve(torch.eye(block.reader.in_features, device=fit.stays.device), ridge).float()
        for module in block.readers.values():
            module.weight.copy_(module.weight.float() @ transfer)
        for number, batch in enumerate(pruned):
            inputs, outputs = inputs_of(forward, fit.module, batch, output_modules[:position])
            target = dense[fit.module][number].float()
            if adds_directly:
                target = target + states[number].float() - batch.float()
                for module, output in zip(output_modules[:position], outputs, strict=True):
                    target += dense[module][number].float() - output.float()
            fit.add(inputs, target)
        fit.solve(ridge)
    return after, [forward(batch) for batch in pruned]


def _rescaled(norm: Any, states: list[Tensor], pruned: list[Tensor], ridge: float) -> Tensor:
    """Weights [hidden] that fit a norm's outputs for the pruned states to its outputs for the dense ones."""
    squares = torch.zeros(norm.weight.shape, dtype=torch.float64, device=norm.weight.device)
    products = torch.zeros_like(squares)
    for dense, batch in zip(states, pruned, strict=True):
        target, output = (norm(hidden).flatten(0, -2).double() for hidden in (dense, batch))
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
    readers: dict[str, Any]  # all have the same inputs

    @property
    def reader(self) -> Any:
        return next(iter(self.readers.values()))


def _block(name: str, block: Any, output: str) -> _Block:
    linear = {f"{name}.{child}": part for child, part in block.named_children() if isinstance(part, torch.nn.Linear)}
    return _Block(f"{name}.{output}", linear.pop(f"{name}.{output}"), linear)


class _Equations:
    """Normal equations that map inputs to target outputs."""

    def __init__(self, outputs: int, inputs: int, device: Any) -> None:
        self.gram = torch.zeros(inputs, inputs, device=device)  # Xᵀ X, float32
        self.cross = torch.zeros(outputs, inputs, device=device)  # Yᵀ X, float32

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add inputs [..., in] and their target outputs [..., out]."""
        inputs, outputs = inputs.flatten(0, -2).float(), outputs.flatten(0, -2).float()
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(outputs.T, inputs)

    def solve(self, weight: Tensor, ridge: float) -> Tensor:
        """The ridge solution pulled towards `weight` [out, in], float64."""
        gram, cross = self.gram.double(), self.cross.double()
        # Positive, so that inputs that are zero on the whole text (after a ReLU, say) do not leave a singular matrix.
        strength = ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        gram.diagonal().add_(strength)
        solution: Tensor = torch.cholesky_solve((cross + strength * weight).T, torch.linalg.cholesky(gram)).T
        return solution


class _Fit:
    """An output projection and the fit of its remaining weights."""

    def __init__(self, module: Any, stays: Tensor) -> None:
        self.module, self.stays = module, stays  # bool [in]
        self.equations = _Equations(len(module.weight), int(stays.sum()), stays.device)
        self.total = torch.zeros(len(stays), dtype=torch.float64, device=stays.device)  # sum of inputs
        self.tokens = 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add inputs [samples, tokens, in] and their target outputs [samples, tokens, out]."""
        if self.module.bias is not None:
            outputs = outputs.float() - self.module.bias.float()
        self.equations.add(inputs[..., self.stays], outputs)

    def add_mean(self, inputs: Tensor) -> None:
        """Add inputs [samples, tokens, in] to the mean alone."""
        self.total += inputs.flatten(0, -2).double().sum(0)
        self.tokens += inputs[..., 0].numel()

    def solve(self, ridge: float) -> None:
        """Write the ridge solution into the module, with zeros for removed inputs."""
        solution = self.equations.solve(self.module.weight[:, self.stays].double(), ridge)
        self.module.weight.zero_()
        self.module.weight[:, self.stays] = solution.to(self.module.weight.dtype)

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
