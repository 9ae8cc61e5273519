"""Importance: one score per coupled group; a higher score means keep."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tailored_llama import models
from tailored_llama.config import Criterion, Work
from tailored_llama.data import read_calibration
from tailored_llama.errors import InputError
from tailored_llama.memory import out_of_memory
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Array, Groups, Owners, read_groups, read_owners
from tailored_llama.pruning.settings import ImportanceSettings
from tailored_llama.store import read_table, write_table

IMPORTANCE_SCHEMA = pa.schema(
    {"group": pa.int32(), "layer": pa.int16(), "kind": pa.string(), "criterion": pa.string(), "score": pa.float64()}
)
_PASS_TOKENS = 4096
_POSITIONS = 64  # with logits in memory at once; more take longer on a CPU, where their memory is faulted in every time


@dataclass(frozen=True)
class Text:
    """Calibration sequences, int64 [samples, tokens], and the most tokens of them per pass; None: 4,096."""

    input_ids: Tensor
    batch_tokens: int | None = None

    def batches(self, even: bool = False) -> tuple[Tensor, ...]:
        """The sequences of each pass, at least one; `even`: as many in each, so that all have the same masks."""
        samples, tokens = self.input_ids.shape
        size = max(1, min(_PASS_TOKENS, self.batch_tokens or _PASS_TOKENS) // tokens)
        if even:
            size = max(divisor for divisor in range(1, size + 1) if samples % divisor == 0)
        return tuple(self.input_ids.split(size))


def score_importance(
    dense: Path, groups: Path, calibration: Path | None, *, settings: ImportanceSettings, work: Work
) -> None:
    """Stage: write `importance.parquet`, one score per coupled group.

    The criteria of `config.DATA_FREE` read no calibration; `random` draws uniformly.
    """
    table, owners = read_groups(groups), read_owners(groups, models.all_tensor_shapes(dense))
    criterion = settings.criterion
    if criterion == "random":
        scores = np.random.default_rng(settings.seed).random(len(table))
    elif criterion == "magnitude_l2":
        scores = magnitude_scores(dense, owners)
    else:
        assert calibration is not None
        model = models.open_model(dense, work.execution, work.out)
        text = Text(read_calibration(calibration), work.execution.batch_tokens)
        scores = taylor_scores(model, text, owners, criterion, work.progress, settings.seed or 0)
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


def taylor_scores(
    model: Any, text: Text, owners: Owners, criterion: Criterion, progress: Progress = silent, seed: int = 0
) -> Array:
    """Taylor importance, the estimated effect on the loss of removing a group.

    `taylor_first` is LLM-Pruner's (arXiv 2305.11627, equation 5, first term): with w a weight and g its gradient of the
    mean loss over samples, a group's score is the sum of |w·g| over all elements of its members.

    `taylor_gate` is ½ of the Fisher information of gates, one per token on all that a group passes to its output
    projection: ½ the mean over samples of the sum over tokens of (Σ x·∂L/∂x)², where x are the projection's inputs that
    the group owns (Molchanov et al., arXiv 1906.10771, section 3, whose gates are single neurons). L is the loss of
    tokens that are drawn from the model itself, given the text, by a seed (Kunstner et al., arXiv 1905.12558).

    No weight has a gradient: a projection's inputs and output gradients give the scores. Memory holds the weights,
    hidden states between layers, one layer's activations, and for `taylor_first` the gradient of one weight and what it
    is made of, in float32. It takes all samples at once, for the absolute value of each element's sum over samples.
    Every layer of a streamed model sees all samples before the next one is read; the scores are equal to the bit.

    Raises:
        InputError: memory ran out for `taylor_first`.
    """
    layers, scores = models.layers_of(model), _zeros(owners)
    gates, samples = criterion == "taylor_gate", len(text.input_ids)
    parts = {name: owned for name, owned in owners.items() if owned[0] == 1} if gates else owners
    chunks = text.batches() if gates else (text.input_ids,)
    projections = {n: m for n, m in model.named_modules() if f"{n}.weight" in parts or f"{n}.bias" in parts}
    generator = torch.Generator().manual_seed(seed) if gates else None
    done = 0

    def watch(name: str, module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Use a projection's inputs and the gradient of its output as soon as both are known."""

        def score(gradient: Tensor) -> None:
            nonlocal done
            if gates:
                _, owner = parts[f"{name}.weight"]
                for own_inputs, own_gradient in zip(states, gradient, strict=True):  # one by one: they are wide
                    _add_gates(scores, owner, own_inputs.float() * (own_gradient @ module.weight).float(), samples)
            else:
                for parameter, factor in (("weight", states), ("bias", torch.ones_like(gradient[..., :1]))):
                    if owned := parts.get(f"{name}.{parameter}"):
                        weight = getattr(module, parameter).detach().view(gradient.shape[-1], -1)
                        sums = gradient.flatten(0, 1).float().T @ factor.flatten(0, 1).float()  # [out, in]
                        add_scores(scores, owned[1], sums.mul_(weight).div_(samples).abs_().sum(1 - owned[0]))
            progress(done := done + 1, len(projections) * len(chunks))

        states = inputs[0].detach()
        if output.requires_grad:  # only on the way back: the first pass builds no graph
            output.register_hook(score)

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


def _zeros(owners: Owners) -> Tensor:
    """A score of zero for every group, float64 [groups]."""
    return torch.zeros(1 + max(int(owner.max()) for _, owner in owners.values()), dtype=torch.float64)


def add_scores(scores: Tensor, owner: Array, values: Tensor) -> None:
    """Add one value per index of a dimension, on any device, to the score of the group that owns the index.

    The scores, float64 [groups] on the CPU, are changed in place.
    """
    owned = torch.from_numpy(np.flatnonzero(owner >= 0))
    scores.index_add_(0, torch.from_numpy(owner)[owned], values.to("cpu", torch.float64)[owned])


def _add_gates(scores: Tensor, owner: Array, products: Tensor, samples: int) -> None:
    """Add one sample's part of ½ the Fisher information of each group's gates to the scores.

    The products are each input times the gradient of the sample's loss by it, [tokens, in].
    """
    groups, columns = np.unique(owner, return_inverse=True)
    gates = products.new_zeros(len(products), len(groups))
    gates.index_add_(1, torch.from_numpy(columns).to(products.device), products)
    add_scores(scores, groups, gates.square().sum(0).double().div(2 * samples))


def _backpropagate(
    model: Any, layers: models.Layers, batches: Sequence[Tensor], generator: torch.Generator | None
) -> None:
    """Run batches through the model and back, layer by layer, which calls the hooks of `taylor_scores`.

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
