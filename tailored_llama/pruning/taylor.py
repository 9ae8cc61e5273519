"""Taylor importance: the estimated effect on the loss of removing a group, without storing weight gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tailored_llama.config import Criterion
from tailored_llama.errors import InputError
from tailored_llama.memory import out_of_memory
from tailored_llama.models import Layers, head_logits, layers_of
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Array, Owners, add_scores, zero_scores
from tailored_llama.pruning.layerwise import Text, enter_all

_POSITIONS = 64  # with logits in memory at once; more take longer on a CPU, where their memory is faulted in every time


def taylor_scores(
    model: Any, text: Text, owners: Owners, criterion: Criterion, progress: Progress = silent, seed: int = 0
) -> Array:
    """Taylor importance from gradients of the language-modelling loss.

    `taylor_first` is LLM-Pruner's (arXiv 2305.11627, equation 5, first term): with w a weight and g its gradient of the
    mean loss over samples, a group's score is the sum of |w·g| over all elements of its members.

    `taylor_gate` is ½ of the Fisher information of gates. There is one gate per token, on everything that a group
    passes to its output projection. The score is ½ the mean over samples of the sum over tokens of (Σ x·∂L/∂x)², where
    x are the projection's inputs that the group owns (Molchanov et al., arXiv 1906.10771, section 3, whose gates are
    single neurons). It measures the joint effect of a group's members; element-wise scores add up their separate
    effects. L is the loss of tokens sampled from the model itself, given the text, as the Fisher information is defined
    (Kunstner et al., arXiv 1905.12558). A seed draws them, whatever the tokens per pass. `taylor_first` uses the text's
    own tokens, as LLM-Pruner does.

    No weight has a gradient: gradients are computed from the inputs and output gradients of a projection. Activations
    are recomputed layer by layer. Besides the weights, memory holds the hidden states between layers, one layer's
    activations, and for `taylor_first` the gradient of one weight and what it is made of, in float32. `taylor_gate`
    takes as many samples at a time as the text's tokens per pass allow. `taylor_first` takes all samples at once,
    because it needs the absolute value of each element's sum over samples. Splitting them would mean keeping that sum,
    as large as the weights.

    Of a streamed model, every layer sees all samples before the next one is read: once forward, once backward. Sums are
    taken in the same order, so the scores are equal to the bit. The hidden states of all samples are kept.

    Raises:
        InputError: memory ran out for `taylor_first`, which cannot split the samples.
    """
    layers, scores = layers_of(model), zero_scores(owners)
    gates, samples = criterion == "taylor_gate", len(text.input_ids)
    parts = {name: own for name, own in owners.items() if own[0] == 1} if gates else owners
    chunks = text.batches() if gates else (text.input_ids,)
    projections = {n: m for n, m in model.named_modules() if f"{n}.weight" in parts or f"{n}.bias" in parts}
    generator = torch.Generator().manual_seed(seed) if gates else None
    done = 0

    def watch(name: str, module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Use a projection's inputs and the gradient of its output as soon as both are known."""
        if output.requires_grad:  # only on the way back: the first pass builds no graph
            output.register_hook(partial(reduce, name, module, inputs[0].detach()))

    def reduce(name: str, module: Any, inputs: Tensor, gradient: Tensor) -> None:
        nonlocal done
        if gates:
            _, owner = parts[f"{name}.weight"]
            for sample_inputs, sample_gradient in zip(inputs, gradient, strict=True):  # one by one: they are wide
                _add_gates(scores, owner, sample_inputs.float() * (sample_gradient @ module.weight).float(), samples)
        else:
            for parameter, states in (("weight", inputs), ("bias", torch.ones_like(gradient[..., :1]))):
                if own := parts.get(f"{name}.{parameter}"):
                    weight = getattr(module, parameter).detach().view(gradient.shape[-1], -1)
                    sums = gradient.flatten(0, 1).float().T @ states.flatten(0, 1).float()  # [out, in]
                    dim, owner = own
                    add_scores(scores, owner, sums.mul_(weight).div_(samples).abs_().sum(1 - dim))
        progress(done := done + 1, len(projections) * len(chunks))

    try:
        with ExitStack() as hooks:
            for name, module in projections.items():
                hooks.enter_context(module.register_forward_hook(partial(watch, name)))
            for batches in [chunks] if layers.streamed else [[chunk] for chunk in chunks]:
                _backpropagate(model, layers, batches, generator)
    except Exception as error:
        if gates or not out_of_memory(error):
            raise
        raise InputError(
            f"pruning.criterion: got {criterion!r}, which takes all {samples} sequences at once, and memory ran out; "
            "allowed: fewer calibration.samples, or taylor_gate, which can split them"
        ) from error
    return scores.numpy()


def _add_gates(scores: Tensor, owner: Array, products: Tensor, samples: int) -> None:
    """Add one sample's part of ½ the Fisher information of each group's gates to the scores, float64 [groups].

    The products are each input times the gradient of the sample's loss by it, [tokens, in].
    """
    groups, columns = np.unique(owner, return_inverse=True)
    gates = products.new_zeros(len(products), len(groups))
    gates.index_add_(1, torch.from_numpy(columns).to(products.device), products)
    information = gates.square().sum(0).double().div(2 * samples).cpu()
    owned = torch.from_numpy(groups >= 0)
    scores.index_add_(0, torch.from_numpy(groups)[owned], information[owned])


def _backpropagate(model: Any, layers: Layers, batches: Sequence[Tensor], generator: torch.Generator | None) -> None:
    """Run batches through the model and back, layer by layer, which calls the hooks of `taylor_scores`.

    Only the hidden states between layers are kept; each layer is run again on the way back.
    """
    with layers.shelf() as shelf:
        with torch.no_grad():
            arguments = enter_all(model, batches, shelf)
            for number, layer in layers.each():
                for index, further in enumerate(arguments):
                    shelf[number + 1, index] = layer(shelf[number, index], **further[number])
        for index, input_ids in enumerate(batches):
            states = shelf[len(layers), index]
            shelf[len(layers), index] = _loss_gradient(model, states, input_ids.to(model.device), generator)
        for number, layer in layers.each(-1):
            for index, further in enumerate(arguments):
                states = shelf[number, index].detach().requires_grad_()
                layer(states, **further[number]).backward(shelf[number + 1, index])
                shelf[number, index] = _gradient(states)
                shelf.drop((number + 1, index))


def _gradient(states: Tensor) -> Tensor:
    assert states.grad is not None
    return states.grad


def _loss_gradient(model: Any, states: Tensor, input_ids: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gradient of the loss by the states after the last layer, [samples, tokens, hidden].

    The loss is the next-token cross-entropy, mean over each sample's tokens, summed over samples. With a generator, the
    target tokens are drawn from the model itself. Logits exist for a bounded number of positions at a time.
    """
    states = states.detach().requires_grad_()
    hidden = model.model.norm(states)[:, :-1]
    gradient = torch.empty_like(hidden)
    for own, of_own, labels in zip(hidden.detach(), gradient, input_ids[:, 1:], strict=True):
        draws = torch.rand(len(own), 1, generator=generator) if generator is not None else None
        for start in range(0, len(own), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            inputs = own[part].requires_grad_()
            logits = head_logits(model, inputs).float()
            targets = labels[part] if draws is None else draw_tokens(logits.detach(), draws[part])
            # not divided by the samples: float16 gradients would vanish
            loss = cross_entropy(logits, targets, reduction="sum") / len(own)
            (of_own[part],) = torch.autograd.grad(loss, inputs)
    hidden.backward(gradient)
    return _gradient(states)


def draw_tokens(logits: Tensor, draws: Tensor) -> Tensor:
    """The token of each distribution, int64 [rows], at a draw from 0 to 1, [rows, 1]; logits are [rows, vocabulary]."""
    chances = logits.softmax(-1).cumsum(-1)
    return (chances < draws.to(logits.device)).sum(-1).clamp_max(logits.shape[-1] - 1)
