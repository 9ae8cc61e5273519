"""Reconstruction: the weights that stay are fitted, layer by layer, to give what the dense model gave."""

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

_BLOCKS = (("self_attn", "o_proj"), ("mlp", "down_proj"))  # of a layer, and what adds to the residual stream


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
    """New tensors of every layer, one layer at a time, and of the last norm.

    With W the dense weight [out, in] of an output projection, K the inputs that stay, X their activations [tokens, K]
    and Y the dense projection's outputs without bias [tokens, out], the new weight is the ridge solution that is
    pulled to W_K:

        Ŵ = (Yᵀ X + λ W_K) (Xᵀ X + λ I)⁻¹,   λ = ridge · mean of the diagonal of Xᵀ X

    * `static`: X and Y are the dense model's. Nothing changes where nothing is removed.
    * `sequential`: X comes from the layers before, already pruned and fitted, and Y corrects what they left: it is the
      dense outputs plus the difference between the dense residual stream and the pruned one before the projection
      (He et al., arXiv 1707.06168, section 3.3). Where a projection's outputs are normalised before they are added
      (Gemma 2 and 3), Y is the dense outputs alone. The projections that read the stream (q, k, v; gate, up) are
      fitted by the same equation to their dense outputs: with D their dense inputs, YᵀX = W DᵀX. Each weight of the
      last norm is multiplied by the solution for its channel alone, a scalar: else that norm, which undoes any scale,
      leaves a damaged model as sure of itself as the dense one.
    * `bias`: the weight is W_K; the mean of what the removed inputs gave is added to the bias (FLAP, arXiv
      2312.11983).

    Memory: the model, the hidden states of the calibration tokens (twice for `sequential`), and one layer's outputs
    (for `sequential`, inputs too) and normal equations.

    Args:
        model: the dense causal LM; what is fitted is overwritten.
        input_ids: calibration tokens, int64 [samples, tokens].
        slices: which group owns which index of which parameter.
        kept: whether each group stays, bool [groups].
        method: one of the three.
        ridge: see above.
        progress: told of every layer done.
        batch_tokens: in a pass through one layer at most; absent: 4,096.

    Yields:
        By name: weights [kept outputs, kept inputs] and biases [out], in the model's type.
    """
    stays = {(part.parameter, part.dim): torch.from_numpy(kept[part.owner]).to(model.device) for part in slices}
    layers = model.model.layers
    states, arguments = first_layer_inputs(model, input_ids, batch_tokens)
    pruned = states
    for number, layer in enumerate(layers):
        blocks = [_block(f"model.layers.{number}.{name}", layer.get_submodule(name), out) for name, out in _BLOCKS]
        fits = [_Fit(block.output, stays[f"{block.name}.weight", 1]) for block in blocks]
        forward = caller(layer, arguments[number])
        found: dict[str, Tensor] = {}
        if method == "sequential":
            added = not hasattr(layer, "post_feedforward_layernorm")
            states, pruned = _fit_in_sequence(forward, blocks, fits, states, pruned, ridge, added)
            readers = {f"{name}.weight": module for block in blocks for name, module in block.readers.items()}
            found = {name: module.weight[stays[name, 0]] for name, module in readers.items()}
        else:
            states = _fit_apart(forward, fits, states, method, ridge)
        for block, fit in zip(blocks, fits, strict=True):
            found |= fit.tensors(block.name)
        yield found
        progress(number + 1, len(layers))
    if method == "sequential":
        yield {"model.norm.weight": _rescaled(model.model.norm, states, pruned, ridge)}


def _fit_apart(
    forward: Forward, fits: list[_Fit], states: list[Tensor], method: Reconstruction, ridge: float
) -> list[Tensor]:
    """Fit each output projection on the dense model's activations; the states after the layer."""
    by_module = {fit.module: fit for fit in fits}
    if method == "static":
        after = observe(forward, list(by_module), states, lambda one, given, made: by_module[one].add(given, made))
        for fit in fits:
            fit.solve(ridge)
    else:
        after = observe(forward, list(by_module), states, lambda one, given, made: by_module[one].add_mean(given))
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
    added: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Fit all projections of a layer on what the pruned model gives them; both models' states after the layer.

    `added` says whether what an output projection gives is added to the residual stream as it is.
    """
    outputs = [block.output for block in blocks]
    dense: dict[Any, list[Tensor]] = {module: [] for block in blocks for module in (block.reader, block.output)}
    after = observe(
        forward, list(dense), states, lambda one, given, made: dense[one].append(made if one in outputs else given)
    )
    for place, (block, fit) in enumerate(zip(blocks, fits, strict=True)):  # each sees what the fitted ones before give
        change = _Equations(block.reader.in_features, block.reader.in_features, fit.stays.device)
        for number, batch in enumerate(pruned):
            change.add(inputs_of(forward, block.reader, batch, [])[0], dense[block.reader][number])
        transfer = change.solve(torch.eye(block.reader.in_features, device=fit.stays.device), ridge).float()
        for module in block.readers.values():
            module.weight.copy_(module.weight.float() @ transfer)
        for number, batch in enumerate(pruned):
            inputs, given = inputs_of(forward, fit.module, batch, outputs[:place])
            target = dense[fit.module][number].float()
            if added:
                target = target + states[number].float() - batch.float()
                for one, now in zip(outputs[:place], given, strict=True):
                    target += dense[one][number].float() - now.float()
            fit.add(inputs, target)
        fit.solve(ridge)
    return after, [forward(batch) for batch in pruned]


def _rescaled(norm: Any, states: list[Tensor], pruned: list[Tensor], ridge: float) -> Tensor:
    """The weights [hidden] with which a norm gives on the pruned states what it gave on the dense ones."""
    squares = torch.zeros(norm.weight.shape, dtype=torch.float64, device=norm.weight.device)
    products = torch.zeros_like(squares)
    for dense, batch in zip(states, pruned, strict=True):
        wanted, given = (norm(one).flatten(0, -2).double() for one in (dense, batch))
        squares += given.square().sum(0)
        products += (given * wanted).sum(0)
    strength = ridge * squares.mean()
    base = 1 if type(norm).__name__.startswith("Gemma") else 0  # Gemma's norms multiply by 1 + weight
    weight: Tensor = (norm.weight.double() + base) * (products + strength) / (squares + strength) - base
    return weight.to(norm.weight.dtype)


@dataclass(frozen=True)
class _Block:
    """Attention or MLP of a layer: the projections that read the residual stream, and the one that adds to it."""

    name: str  # of the output projection
    output: Any
    readers: dict[str, Any]  # all are given the same inputs

    @property
    def reader(self) -> Any:
        return next(iter(self.readers.values()))


def _block(name: str, block: Any, output: str) -> _Block:
    linear = {f"{name}.{child}": one for child, one in block.named_children() if isinstance(one, torch.nn.Linear)}
    return _Block(f"{name}.{output}", linear.pop(f"{name}.{output}"), linear)


class _Equations:
    """Normal equations of outputs that are wanted of inputs."""

    def __init__(self, outputs: int, inputs: int, device: Any) -> None:
        self.gram = torch.zeros(inputs, inputs, device=device)  # Xᵀ X, float32
        self.cross = torch.zeros(outputs, inputs, device=device)  # Yᵀ X, float32

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in inputs [..., in] and the outputs wanted of them [..., out]."""
        inputs, outputs = inputs.flatten(0, -2).float(), outputs.flatten(0, -2).float()
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(outputs.T, inputs)

    def solve(self, weight: Tensor, ridge: float) -> Tensor:
        """The ridge solution that is pulled to `weight` [out, in], float64."""
        gram, cross = self.gram.double(), self.cross.double()
        # Inputs that are zero on all of the text (a ReLU's, say) leave only the pull: never a singular matrix.
        strength = ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        gram.diagonal().add_(strength)
        solution: Tensor = torch.cholesky_solve((cross + strength * weight).T, torch.linalg.cholesky(gram)).T
        return solution


class _Fit:
    """An output projection, and what becomes of it."""

    def __init__(self, module: Any, stays: Tensor) -> None:
        self.module, self.stays = module, stays  # bool [in]
        self.equations = _Equations(len(module.weight), int(stays.sum()), stays.device)
        self.total = torch.zeros(len(stays), dtype=torch.float64, device=stays.device)  # of all inputs
        self.tokens = 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in inputs [samples, tokens, in] and the outputs wanted of them [samples, tokens, out]."""
        if self.module.bias is not None:
            outputs = outputs.float() - self.module.bias.float()
        self.equations.add(inputs[..., self.stays], outputs)

    def add_mean(self, inputs: Tensor) -> None:
        """Take in inputs [samples, tokens, in] for their mean alone."""
        self.total += inputs.flatten(0, -2).double().sum(0)
        self.tokens += inputs[..., 0].numel()

    def solve(self, ridge: float) -> None:
        """Put the ridge solution into the module, zeros where inputs are removed."""
        solution = self.equations.solve(self.module.weight[:, self.stays].double(), ridge)
        self.module.weight.zero_()
        self.module.weight[:, self.stays] = solution.to(self.module.weight.dtype)

    def compensate(self) -> None:
        """Put the mean output of the removed inputs into the module's bias."""
        mean = self.total / self.tokens
        lost = self.module.weight[:, ~self.stays].double() @ mean[~self.stays]
        before = 0 if self.module.bias is None else self.module.bias.double()
        self.module.bias = torch.nn.Parameter((before + lost).to(self.module.weight.dtype), requires_grad=False)
        self.module.weight[:, ~self.stays] = 0

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What the pruned checkpoint holds of this projection."""
        found = {f"{name}.weight": self.module.weight[:, self.stays].contiguous()}
        if self.module.bias is not None:
            found[f"{name}.bias"] = self.module.bias.data
        return found
