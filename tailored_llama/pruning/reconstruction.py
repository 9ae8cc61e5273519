"""Reconstruction: the weights that stay are fitted, layer by layer, to give what the dense layer gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailored_llama.calibration import sequences_at_once
from tailored_llama.config import Reconstruction
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Slices

Forward = Callable[[Tensor], Tensor]  # a layer's hidden states before → after
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")  # the projections that read coupled groups


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
    """New tensors of the two output projections of every layer, one layer at a time.

    With W the dense weight [out, in], K the inputs that stay, X their activations [tokens, K] and Y the dense
    projection's outputs without bias [tokens, out], the new weight is the ridge solution that is pulled to W_K:

        Ŵ = (Yᵀ X + λ W_K) (Xᵀ X + λ I)⁻¹,   λ = ridge · mean of the diagonal of Xᵀ X

    * `static`: X and Y are the dense model's. Nothing changes where nothing is removed.
    * `sequential`: X comes from the layers before, already pruned and fitted, and Y corrects what they left: it is the
      dense outputs plus the difference between the dense residual stream and the pruned one before the projection
      (He et al., arXiv 1707.06168, section 3.3). Where a projection's outputs are normalised before they are added
      (Gemma 2 and 3), Y is the dense outputs alone.
    * `bias`: the weight is W_K; the mean of what the removed inputs gave is added to the bias (FLAP, arXiv
      2312.11983).

    Memory: the model, the hidden states of the calibration tokens (twice for `sequential`), and one layer's outputs
    and normal equations.

    Args:
        model: the dense causal LM; its output projections are overwritten.
        input_ids: calibration tokens, int64 [samples, tokens].
        slices: which group owns which index of which parameter.
        kept: whether each group stays, bool [groups].
        method: one of the three.
        ridge: see above.
        progress: told of every layer done.
        batch_tokens: in a pass through one layer at most; absent: 4,096.

    Yields:
        By name: weights [out, kept inputs] and biases [out], in the model's type.
    """
    stays = {part.parameter: torch.from_numpy(kept[part.owner]).to(model.device) for part in slices if part.dim == 1}
    layers = model.model.layers
    states, arguments = _first_layer_inputs(model, input_ids, batch_tokens)
    pruned = states
    for number, layer in enumerate(layers):
        names = [f"model.layers.{number}.{output}" for output in OUTPUTS]
        fits = [_Fit(model.get_submodule(name), stays[f"{name}.weight"]) for name in names]
        forward = _caller(layer, arguments[number])
        if method == "sequential":
            added = not hasattr(layer, "post_feedforward_layernorm")
            states, pruned = _fit_in_sequence(forward, fits, states, pruned, ridge, added)
        elif method == "static":
            states = _observe(forward, fits, states, lambda fit, inputs, outputs: fit.add(inputs, outputs))
            for fit in fits:
                fit.solve(ridge)
        else:
            states = _observe(forward, fits, states, lambda fit, inputs, outputs: fit.add_mean(inputs))
            for fit in fits:
                fit.compensate()
        yield {k: v for name, fit in zip(names, fits, strict=True) for k, v in fit.tensors(name).items()}
        progress(number + 1, len(layers))


def _fit_in_sequence(
    forward: Forward, fits: list[_Fit], states: list[Tensor], pruned: list[Tensor], ridge: float, added: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Fit each projection on what the pruned model gives it; both models' states after the layer.

    `added` says whether what a projection gives is added to the residual stream as it is.
    """
    wanted: dict[int, list[Tensor]] = {id(fit): [] for fit in fits}
    after = _observe(forward, fits, states, lambda fit, inputs, outputs: wanted[id(fit)].append(outputs))
    for place, fit in enumerate(fits):  # the second one sees what the first one's solution gives
        for number, batch in enumerate(pruned):
            inputs, given = _inputs(forward, [one.module for one in fits[:place]], fit.module, batch)
            target = wanted[id(fit)][number].float()
            if added:
                target = target + states[number].float() - batch.float()
                for one, now in zip(fits[:place], given, strict=True):
                    target += wanted[id(one)][number].float() - now.float()
            fit.add(inputs, target)
        fit.solve(ridge)
    return after, [forward(batch) for batch in pruned]


@dataclass
class _Fit:
    """The normal equations of one output projection, and what becomes of it."""

    module: Any
    stays: Tensor  # bool [in]
    gram: Tensor = field(init=False)  # Xᵀ X, float32 [kept, kept]
    cross: Tensor = field(init=False)  # Yᵀ X, float32 [out, kept]
    total: Tensor = field(init=False)  # sum of all inputs, float64 [in]
    tokens: int = 0

    def __post_init__(self) -> None:
        outputs, kept, device = len(self.module.weight), int(self.stays.sum()), self.stays.device
        self.gram = torch.zeros(kept, kept, device=device)
        self.cross = torch.zeros(outputs, kept, device=device)
        self.total = torch.zeros(len(self.stays), dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in inputs [samples, tokens, in] and the outputs wanted of them [samples, tokens, out]."""
        inputs, outputs = inputs.flatten(0, -2).float(), outputs.flatten(0, -2).float()
        if self.module.bias is not None:
            outputs = outputs - self.module.bias.float()
        inputs = inputs[:, self.stays]
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(outputs.T, inputs)

    def add_mean(self, inputs: Tensor) -> None:
        """Take in inputs [samples, tokens, in] for their mean alone."""
        self.total += inputs.flatten(0, -2).double().sum(0)
        self.tokens += inputs[..., 0].numel()

    def solve(self, ridge: float) -> None:
        """Put the ridge solution into the module, zeros where inputs are removed."""
        weight = self.module.weight[:, self.stays].double()
        gram, cross = self.gram.double(), self.cross.double()
        # Inputs that are zero on all of the text (a ReLU's, say) leave only the pull: never a singular matrix.
        strength = ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        gram.diagonal().add_(strength)
        solution = torch.cholesky_solve((cross + strength * weight).T, torch.linalg.cholesky(gram)).T
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


class _Stop(Exception):
    """Ends a forward pass as soon as what is wanted of it is known."""


def _first_layer_inputs(
    model: Any, input_ids: Tensor, batch_tokens: int | None
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Hidden states before the first layer, batch by batch, and what else each layer is called with.

    All batches have the same shape, so masks and positions of the first one serve for all.
    """
    most = sequences_at_once(input_ids, batch_tokens)
    size = max(d for d in range(1, most + 1) if len(input_ids) % d == 0)
    states: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def first(module: Any, given: tuple[Tensor, ...], others: dict[str, Any]) -> None:
        states.append(given[0])
        if len(states) > 1:
            raise _Stop

    def each(module: Any, given: tuple[Tensor, ...], others: dict[str, Any]) -> None:
        if len(states) == 1:
            arguments.append(others)

    layers = model.model.layers
    handles = [layers[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(each, with_kwargs=True) for layer in layers]
    try:
        for batch in input_ids.split(size):
            try:
                model.model(input_ids=batch.to(model.device), use_cache=False)
            except _Stop:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return states, arguments


def _caller(layer: Any, arguments: dict[str, Any]) -> Forward:
    def forward(states: Tensor) -> Tensor:
        result = layer(states, **arguments)
        after: Tensor = result[0] if isinstance(result, tuple) else result
        return after

    return forward


def _observe(
    forward: Forward, fits: list[_Fit], states: list[Tensor], see: Callable[[_Fit, Tensor, Tensor], Any]
) -> list[Tensor]:
    """Run a layer, batch by batch, and call `see` with the inputs and outputs of each projection."""

    def hook(fit: _Fit) -> Callable[..., None]:
        return lambda module, given, outputs: see(fit, given[0], outputs)

    handles = [fit.module.register_forward_hook(hook(fit)) for fit in fits]
    try:
        return [forward(batch) for batch in states]
    finally:
        for handle in handles:
            handle.remove()


def _inputs(forward: Forward, before: list[Any], module: Any, states: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What a module of a layer is given, and what modules `before` it give on the way."""
    found: list[Tensor] = []
    given: list[Tensor] = []

    def stop(module: Any, inputs: tuple[Tensor]) -> None:
        found.append(inputs[0])
        raise _Stop

    handles = [one.register_forward_hook(lambda module, inputs, outputs: given.append(outputs)) for one in before]
    handles.append(module.register_forward_pre_hook(stop))
    try:
        forward(states)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0], given
