"""Taylor importance: what removing a group would do to the loss, by its gradient, without ever holding gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tailored_llama.calibration import sequences_at_once
from tailored_llama.config import Criterion
from tailored_llama.errors import InputError
from tailored_llama.memory import out_of_memory
from tailored_llama.models import head_logits
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Slices, add_scores, by_parameter

_BLOCK = 2**24  # elements of per-sample gradients in memory at once: 67 MB in float32


def taylor_scores(
    model: Any,
    input_ids: Tensor,
    slices: list[Slices],
    groups: int,
    criterion: Criterion,
    progress: Progress = silent,
    batch_tokens: int | None = None,
    seed: int = 0,
) -> np.ndarray[Any, Any]:
    """Taylor importance by gradient of the language-modelling loss (LLM-Pruner, arXiv 2305.11627, section 3.2).

    With w a weight, g its gradient of the mean loss over samples, and F the mean over samples of the squared gradient
    of each one's loss (the diagonal of the empirical Fisher matrix), a group's score is the sum over its members of

    * `taylor_first`: |w·g| of every element (equation 5, first term);
    * `taylor_vector`: |Σ w·g| over each row or column;
    * `taylor_second`: ½·w²·F of every element;
    * `taylor_mixed`: |w·g − ½·w²·F| of every element (equation 5).

    `taylor_gate` imagines, at every token, one gate on all that a group gives to its output projection, and is ½ of the
    Fisher information of those gates: ½ the mean over samples of the sum over tokens of (Σ x·∂L/∂x)², x being the
    inputs of the projection that the group owns (Molchanov et al., arXiv 1906.10771, section 3, whose gates are single
    neurons). What members of a group do together counts, where element-wise scores add up what each does alone. L is
    the loss of tokens that the model itself draws after those of the text, as the Fisher information has it (Kunstner
    et al., arXiv 1905.12558); the other criteria take the text's own tokens, as LLM-Pruner does.

    No weight has a gradient: the inputs and output gradients of a projection give those of every sample, a block of
    rows at a time. Activations are recomputed layer by layer. Beside the weights, memory holds the hidden states
    between layers, one layer's activations, and 67 MB of gradients. Most criteria take samples 4,096 tokens at a time;
    `taylor_first` and `taylor_mixed` take all at once, since the absolute value of each element is that of its sum over
    all samples: to take them apart, that sum would have to be kept, and it is as large as the weights.

    Args:
        model: a causal LM, its weights frozen.
        input_ids: int64 [samples, tokens].
        slices: which group owns which index of which parameter.
        groups: their number.
        criterion: one of the five.
        progress: told of every projection done.
        batch_tokens: at most so many at a time, where samples may be taken apart; one sample in any case.
        seed: of the tokens drawn for `taylor_gate`; they do not depend on `batch_tokens`.

    Raises:
        InputError: memory ran out for samples that may not be taken apart.
    """
    scores = torch.zeros(groups, dtype=torch.float64)
    gates, samples = criterion == "taylor_gate", len(input_ids)
    parts = by_parameter([part for part in slices if part.dim == 1] if gates else slices)
    apart = criterion not in ("taylor_first", "taylor_mixed")
    chunks = input_ids.split(sequences_at_once(input_ids, batch_tokens) if apart else samples)
    projections = {n: m for n, m in model.named_modules() if f"{n}.weight" in parts or f"{n}.bias" in parts}
    sums: dict[int, tuple[Slices, Tensor]] = {}  # of rows or columns over samples, before absolute values are taken
    drawn = torch.Generator().manual_seed(seed) if gates else None
    done = 0

    def reduce(name: str, module: Any, inputs: Tensor, gradient: Tensor) -> None:
        nonlocal done
        if gates:
            (part,) = parts[f"{name}.weight"]
            for given, received in zip(inputs, gradient, strict=True):  # a sample at a time: they are wide
                _add_gates(scores, part, given.float() * (received @ module.weight).float(), samples)
        else:
            for parameter, weight, states in (("weight", module.weight, inputs), ("bias", module.bias, None)):
                for part, values in _reduce(weight, states, gradient, parts.get(f"{name}.{parameter}", []), element):
                    before = sums.get(id(part))
                    sums[id(part)] = part, values.double() + (before[1] if before else 0)
        progress(done := done + 1, len(projections) * len(chunks))

    def element(weight: Tensor, gradients: Tensor) -> Tensor:
        """Score of every element [rows, columns] from its gradients of each sample's loss [samples, rows, columns]."""
        first = weight * gradients.sum(0) / samples
        if criterion == "taylor_vector":
            return first
        if criterion == "taylor_first":
            return first.abs()
        second = weight.square() * gradients.square().sum(0) / (2 * samples)
        return second if criterion == "taylor_second" else (first - second).abs()

    try:
        with _recomputed(model), _watched(projections, reduce):
            for batch in chunks:
                # not divided by the samples before: float16 gradients would vanish
                _summed_loss(model, batch.to(model.device), drawn).backward()
    except Exception as error:
        if apart or not out_of_memory(error):
            raise
        raise InputError(
            f"pruning.criterion: got {criterion!r}, which takes all {samples} sequences at once, and memory ran out; "
            "allowed: fewer calibration.samples, or taylor_gate, taylor_vector or taylor_second, which take few at once"
        ) from error
    for part, values in sums.values():
        add_scores(scores, part, values.abs())
    return scores.numpy()


def _add_gates(scores: Tensor, part: Slices, products: Tensor, samples: int) -> None:
    """Add ½ of the Fisher information that one sample gives of the gates of each group.

    Args:
        scores: float64 [groups]; changed in place.
        part: which group owns which input of the projection.
        products: input · its gradient of the sample's loss, [tokens, in].
        samples: the number of all.
    """
    groups, place = np.unique(part.owner, return_inverse=True)
    gates = products.new_zeros(len(products), len(groups))
    gates.index_add_(1, torch.from_numpy(place).to(products.device), products)
    found = gates.square().sum(0).double().div(2 * samples).cpu()
    owned = torch.from_numpy(groups >= 0)
    scores.index_add_(0, torch.from_numpy(groups)[owned], found[owned])


def _reduce(
    weight: Tensor | None,
    inputs: Tensor | None,
    gradient: Tensor,
    parts: list[Slices],
    element: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[tuple[Slices, Tensor]]:
    """Sum elements over the rows and columns that groups own.

    Args:
        weight: [out, in], or a bias [out].
        inputs: of the projection, [samples, tokens, in]; None for a bias.
        gradient: of its output, [samples, tokens, out].
        parts: who owns which rows (dim 0) or columns (dim 1).
        element: the score of every element of a block.
    """
    if weight is None or not parts:
        return
    matrix = weight.detach().view(len(weight), -1)
    if inputs is None:
        inputs = torch.ones_like(gradient[..., :1])
    inputs = inputs.float()
    rows = torch.zeros(matrix.shape[0], device=matrix.device)
    columns = torch.zeros(matrix.shape[1], device=matrix.device)
    block = max(1, _BLOCK // (len(gradient) * matrix.shape[1]))
    for start in range(0, len(matrix), block):
        here = slice(start, start + block)
        values = element(matrix[here].float(), gradient[..., here].float().transpose(1, 2) @ inputs)
        rows[here] = values.sum(1)
        columns += values.sum(0)
    for part in parts:
        yield part, columns if part.dim else rows


@contextmanager
def _watched(projections: dict[str, Any], reduce: Callable[[str, Any, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `reduce` with a projection's inputs and the gradient of its output, as soon as both are known."""

    def hook(name: str) -> Callable[..., None]:
        def forward(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            if output.requires_grad:  # the second time: the first forward pass of a layer keeps nothing
                states = inputs[0].detach()
                output.register_hook(lambda gradient: reduce(name, module, states, gradient))

        return forward

    handles = [module.register_forward_hook(hook(name)) for name, module in projections.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recomputed(model: Any) -> Iterator[None]:
    """Keep only hidden states between layers; dropout stays off."""
    # Reentrant: the other kind would run hooks in its first pass too, and so keep every layer's activations alive.
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        model.disable_input_require_grads()
        model.activation_checkpointing_disable()


def _summed_loss(model: Any, input_ids: Tensor, drawn: torch.Generator | None) -> Tensor:
    """Next-token cross-entropy, mean over each sample's tokens, summed over samples; logits of one sample at a time.

    With a generator, the tokens to predict are the model's own draws.
    """
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]

    def sample_loss(states: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(head_logits(model, states).float(), labels)

    def draw(states: Tensor) -> Tensor:
        with torch.no_grad():
            return draw_tokens(head_logits(model, states).float(), drawn)

    wanted = input_ids[:, 1:] if drawn is None else [draw(states) for states in hidden]
    losses = [checkpoint(sample_loss, h, ids, use_reentrant=False) for h, ids in zip(hidden, wanted, strict=True)]
    return torch.stack(losses).sum()


def draw_tokens(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token of each distribution, int64 [rows], from logits [rows, vocabulary]; the same draws on any device."""
    chances = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    return (logits.softmax(-1).cumsum(-1) < chances).sum(-1).clamp_max(logits.shape[-1] - 1)
