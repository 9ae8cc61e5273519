"""Importance: one score per coupled group; a higher score means keep."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tailored_llama import models
from tailored_llama.config import Work
from tailored_llama.data import read_calibration
from tailored_llama.errors import InputError
from tailored_llama.memory import out_of_memory
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Array, Groups, Owners, owners_of, read_groups
from tailored_llama.pruning.settings import ImportanceSettings
from tailored_llama.store import read_table, write_table

IMPORTANCE_SCHEMA = pa.schema(
    {"group": pa.int32(), "layer": pa.int16(), "kind": pa.string(), "criterion": pa.string(), "score": pa.float64()}
)
_PASS_TOKENS = 4096
_POSITIONS = 64  # with logits in memory at once; more take longer on a CPU, where their memory is faulted in every time


def in_passes(input_ids: Tensor, batch_tokens: int | None = None, even: bool = False) -> tuple[Tensor, ...]:
    """Calibration sequences, int64 [samples, tokens], in passes of at most so many tokens, but at least one sequence.

    `even`: as many in each, so that all have the same masks.
    """
    samples, tokens = input_ids.shape
    size = max(1, min(_PASS_TOKENS, batch_tokens or _PASS_TOKENS) // tokens)
    if even:
        size = max(divisor for divisor in range(1, size + 1) if samples % divisor == 0)
    return tuple(input_ids.split(size))


def score_importance(
    dense: Path, groups: Path, calibration: Path | None, *, settings: ImportanceSettings, work: Work
) -> None:
    """Stage: write `importance.parquet`, one score per coupled group.

    The criteria of `config.DATA_FREE` read no calibration; `random` draws uniformly.
    """
    table, owners = read_groups(groups), owners_of(dense)
    criterion = settings.criterion
    if not owners:  # only tokens leave
        scores = np.zeros(0)
    elif criterion == "random":
        scores = np.random.default_rng(settings.seed).random(len(table))
    elif criterion == "magnitude_l2":
        scores = magnitude_scores(dense, owners)
    else:
        assert calibration is not None
        model = models.open_model(dense, work.execution, work.out)
        input_ids = read_calibration(calibration)
        if criterion == "taylor_first":
            scores = taylor_first_scores(model, input_ids, owners, work.progress)
        else:
            batches = in_passes(input_ids, work.execution.batch_tokens)
            scores = taylor_gate_scores(model, batches, owners, work.progress, settings.seed or 0)
    write_importance(work.out, table, scores, criterion)


def write_importance(out: Path, groups: Groups, scores: Array, criterion: str) -> None:
    """Write `importance.parquet`.

    Raises:
        FloatingPointError: a score is not finite.
    """
    if not np.isfinite(scores).all():
        first = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise FloatingPointError(
            f"importance of group {first} (layer {groups.layer[first]}, {groups.kind[first]}) is {scores[first]}"
        )
    columns = {"group": range(len(groups)), "layer": groups.layer, "kind": groups.kind, "score": scores}
    write_table(out / "importance.parquet", columns | {"criterion": [criterion] * len(groups)}, IMPORTANCE_SCHEMA)


def read_importance(folder: Path) -> Array:
    """Scores of all groups, float64 [groups]."""
    return np.asarray(read_table(folder / "importance.parquet", IMPORTANCE_SCHEMA)["score"].to_numpy())


def magnitude_scores(dense: Path, owners: Owners) -> Array:
    """L2 (Euclidean) norm of all weights of each group; tensors are read one at a time."""
    scores, read = _zeros(owners), models.tensor_reader(models.weight_files(dense))
    for name in sorted(owners):
        (dim, owner), weight = owners[name], read(name).float()
        add_scores(scores, owner, weight.square().view(len(weight), -1).sum(1 - dim))
    return scores.sqrt().numpy()


def taylor_first_scores(model: Any, input_ids: Tensor, owners: Owners, progress: Progress = silent) -> Array:
    """First-order Taylor importance, the estimated effect on the loss of removing a group.

    It is LLM-Pruner's (arXiv 2305.11627, equation 5, first term): with w a weight and g its gradient of the mean loss
    over samples, a group's score is the sum of |w·g| over all elements of its members.

    No weight has a gradient: a projection's inputs and output gradients give the scores. Memory holds the weights,
    hidden states between layers, one layer's activations, and the gradient of one weight and what it is made of, in
    float32. All samples are taken at once, for the absolute value of each element's sum over samples.

    Raises:
        InputError: memory ran out.
    """
    scores, samples = _zeros(owners), len(input_ids)

    def add(name: str, module: Any, inputs: Tensor, gradient: Tensor) -> None:
        for parameter, factor in (("weight", inputs), ("bias", torch.ones_like(gradient[..., :1]))):
            if owned := owners.get(f"{name}.{parameter}"):
                weight = getattr(module, parameter).detach().view(gradient.shape[-1], -1)
                sums = gradient.flatten(0, 1).float().T @ factor.flatten(0, 1).float()  # [out, in]
                add_scores(scores, owned[1], sums.mul_(weight).div_(samples).abs_().sum(1 - owned[0]))

    try:
        _backpropagate(model, [input_ids], owners, add, progress)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise InputError(
            f"pruning.criterion: got 'taylor_first', which takes all {samples} sequences at once, and memory ran out; "
            "allowed: fewer calibration.samples, or taylor_gate, which can split them"
        ) from error
    return scores.numpy()


def taylor_gate_scores(
    model: Any, batches: Sequence[Tensor], owners: Owners, progress: Progress = silent, seed: int = 0
) -> Array:
    """½ of the Fisher information of gates, one per token on all that a group passes to its output projection.

    It is ½ the mean over samples of the sum over tokens of (Σ x·∂L/∂x)², where x are the projection's inputs that the
    group owns (Molchanov et al., arXiv 1906.10771, section 3, whose gates are single neurons). L is the loss of tokens
    that are drawn from the model itself, given the text, by a seed (Kunstner et al., arXiv 1905.12558).

    Memory holds the weights, hidden states between layers, and one layer's activations. Every layer of a streamed model
    sees all samples before the next one is read; the scores are equal to the bit.
    """
    scores, samples = _zeros(owners), sum(map(len, batches))
    outputs = {name: owned for name, owned in owners.items() if owned[0] == 1}

    def add(name: str, module: Any, inputs: Tensor, gradient: Tensor) -> None:
        groups, columns = np.unique(outputs[f"{name}.weight"][1], return_inverse=True)
        for own_inputs, own_gradient in zip(inputs, gradient, strict=True):  # one by one: they are wide
            products = own_inputs.float() * (own_gradient @ module.weight).float()
            gates = products.new_zeros(len(products), len(groups))
            gates.index_add_(1, torch.from_numpy(columns).to(products.device), products)
            add_scores(scores, groups, gates.square().sum(0).double().div(2 * samples))

    _backpropagate(model, batches, outputs, add, progress, torch.Generator().manual_seed(seed))
    return scores.numpy()


def _zeros(owners: Owners) -> Tensor:
    """A score of zero for every group, float64 [groups]."""
    return torch.zeros(1 + max(int(owner.max()) for _, owner in owners.values()), dtype=torch.float64)


def add_scores(scores: Tensor, owner: Array, values: Tensor) -> None:
    """Add one value per index of a dimension, on any device, to the score of the group that owns the index.

    The scores, float64 [groups] on the CPU, are changed in place.
    """
    owned = torch.from_numpy(np.flatnonzero(owner >= 0))
    scores.index_add_(0, torch.from_numpy(owner)[owned], values.to("cpu", torch.float64)[owned])


def _backpropagate(
    model: Any,
    chunks: Sequence[Tensor],
    owners: Owners,
    use: Callable[[str, Any, Tensor, Tensor], None],
    progress: Progress,
    generator: torch.Generator | None = None,
) -> None:
    """Run sequences through the model and back, and `use` each projection that is owned, once its gradient is known.

    That is with its name, itself, its inputs and the gradient of its outputs.
    """
    layers, done = models.layers_of(model), count(1)
    total = len(layers) * len(chunks)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if f"{name}.weight" in owners or f"{name}.bias" in owners:
                hooks.enter_context(module.register_forward_hook(partial(_watch, partial(use, name, module))))
        for batches in [chunks] if layers.streamed else [[chunk] for chunk in chunks]:
            _both_ways(model, layers, batches, generator, lambda: progress(next(done), total))


def _watch(use: Callable[[Tensor, Tensor], None], module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    if output.requires_grad:  # only on the way back: the first pass builds no graph
        output.register_hook(partial(use, inputs[0].detach()))


def _both_ways(
    model: Any,
    layers: models.Layers,
    batches: Sequence[Tensor],
    generator: torch.Generator | None,
    step: Callable[[], None],
) -> None:
    """Run batches through the model and back, layer by layer, with a `step` after each batch on the way back.

    Only the hidden states between layers are kept; each layer is run again on the way back.
    """
    arguments: list[list[dict[str, Any]]] = []  # of every batch and layer
    with layers.shelf() as shelf:  # hidden states, then their gradients, by layer and batch
        with torch.no_grad():
            for index, input_ids in enumerate(batches):
                shelf[0, index], further = models.enter(model, input_ids=input_ids.to(model.device))
                arguments.append(further)
            for number, layer in layers.each():
                for index, further in enumerate(arguments):
                    shelf[number + 1, index] = layer(shelf[number, index], **further[number])
        for index, input_ids in enumerate(batches):
            states = shelf[len(layers), index]
            shelf[len(layers), index] = _loss_gradient(model, states, input_ids.to(model.device), generator)
        for number, layer in layers.each(-1):
            for index, further in enumerate(arguments):
                states = shelf[number, index].detach().requires_grad_()
                later = shelf[number + 1, index]
                (shelf[number, index],) = torch.autograd.grad(layer(states, **further[number]), states, later)
                shelf.drop((number + 1, index))
                step()


def _loss_gradient(model: Any, states: Tensor, input_ids: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gradient of the loss by the states after the last layer, [samples, tokens, hidden].

    The loss is the next-token cross-entropy, mean over each sample's tokens, summed over samples. With a generator, the
    target tokens are drawn from the model itself. Logits exist for a bounded number of positions at a time.
    """
    states = states.detach().requires_grad_()
    hidden = model.model.norm(states)[:, :-1]
    gradient = torch.empty_like(hidden)
    for sample, of_own, labels in zip(hidden.detach(), gradient, input_ids[:, 1:], strict=True):
        draws = torch.rand(len(sample), 1, generator=generator) if generator is not None else None
        for start in range(0, len(sample), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            inputs = sample[part].requires_grad_()
            logits = models.head_logits(model, inputs).float()
            targets = labels[part] if draws is None else draw_tokens(logits.detach(), draws[part])
            # not divided by the samples: float16 gradients would vanish
            loss = cross_entropy(logits, targets, reduction="sum") / len(sample)
            (of_own[part],) = torch.autograd.grad(loss, inputs)
    (of_states,) = torch.autograd.grad(hidden, states, gradient)
    return of_states


def draw_tokens(logits: Tensor, draws: Tensor) -> Tensor:
    """The token of each distribution, int64 [rows], at a draw from 0 to 1, [rows, 1]; logits are [rows, vocabulary]."""
    chances = logits.softmax(-1).cumsum(-1)
    return (chances < draws.to(logits.device)).sum(-1).clamp_max(logits.shape[-1] - 1)
