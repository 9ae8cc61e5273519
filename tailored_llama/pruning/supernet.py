"""A supernet: a model whose blocks each have several widths, fitted once, and the divergence of any choice of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailored_llama.models import Document, caller, enter, head_logits, layers_of, packed_inputs
from tailored_llama.progress import Progress
from tailored_llama.pruning.groups import Slices
from tailored_llama.pruning.layerwise import Text, enter_all, watching
from tailored_llama.pruning.plan import Block
from tailored_llama.pruning.ridge import Equations

_OUTPUTS = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}  # of each kind of block
_POSITIONS = 64  # with logits in memory at once; a few hundred would be slower on a CPU: their pages are new each time

Levels = tuple[int, ...]  # of every block


@dataclass(frozen=True)
class _Fitted:
    """The output projection of a block at one level: its inputs that stay, int64 [kept], and weights [out, kept]."""

    inputs: Tensor
    weight: Tensor


Fits = list[list[_Fitted]]  # by block and level


@torch.inference_mode()
def fit_levels(
    model: Any,
    input_ids: Tensor,
    slices: Sequence[Slices],
    blocks: Sequence[Block],
    ridge: float,
    progress: Progress,
    batch_tokens: int | None = None,
) -> Fits:
    """Fit the output projection of every block at every level, as reconstruction's method `static` does.

    All levels of a block share one sum of squared activations of the dense model. The outputs of the dense projection
    follow from its inputs, so no other sum is needed.

    Memory: besides the model, its hidden states at one layer, and the fits. With eight levels they take about four
    times as much as the output projections.

    Args:
        model: the dense causal LM, in memory; not changed.
        input_ids: calibration tokens, int64 [samples, tokens].
        slices: which group owns which index of which parameter.
        blocks: with the widths to fit.
        ridge: see `reconstruct`.
        progress: called after every layer.
        batch_tokens: most tokens per pass through one layer; None: 4,096.
    """
    owners = {(part.parameter, part.dim): part.owner for part in slices}
    layers, batches = layers_of(model), Text(input_ids, batch_tokens).even_batches()
    fits: Fits = [[] for _ in blocks]
    with layers.shelf() as shelf:
        arguments = enter_all(model, batches, shelf)[0]
        for number, layer in layers.forward():
            grams = {index: _Gram(model, block) for index, block in enumerate(blocks) if block.layer == number}
            forward = caller(layer, arguments[number])
            for index in range(len(batches)):
                with watching([gram.module for gram in grams.values()]) as seen:
                    shelf[number + 1, index] = forward(shelf[number, index])
                for gram in grams.values():
                    gram.add(seen[gram.module].inputs)
                shelf.drop((number, index))
            for index, gram in grams.items():
                fits[index] = list(gram.fits(blocks[index], owners[f"{gram.name}.weight", 1], ridge))
            progress(number + 1, len(layers))
    return fits


class _Gram:
    """Sum of squared inputs of a block's output projection, float32 [in, in]."""

    def __init__(self, model: Any, block: Block) -> None:
        self.name = f"model.layers.{block.layer}.{_OUTPUTS[block.kind]}"
        self.module = model.get_submodule(self.name)
        width = self.module.in_features
        self.total = torch.zeros(width, width, device=self.module.weight.device)

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., in]."""
        states = inputs.flatten(0, -2).float()
        self.total.addmm_(states.T, states)

    def fits(self, block: Block, owner: np.ndarray[Any, Any], ridge: float) -> Iterator[_Fitted]:
        """The dense weights, and those of every narrower level."""
        weight = self.module.weight
        yield _Fitted(torch.arange(weight.shape[1], device=weight.device), weight.clone())
        cross = weight.float() @ self.total
        for level in range(1, len(block.widths)):
            stays = torch.from_numpy(np.flatnonzero(~np.isin(owner, block.leaving(level)))).to(weight.device)
            fitted = weight[:, stays]
            if len(stays):
                equations = Equations(0, 0, weight.device)
                equations.gram, equations.cross = self.total[stays][:, stays], cross[:, stays]
                equations.solve(fitted, ridge)
            yield _Fitted(stays, fitted)


@dataclass
class _Row:
    """Documents packed in one row, and what the dense model says along them."""

    arguments: list[dict[str, Any]]  # of every layer
    states: list[Tensor]  # before every layer and after the last, of the model that is held
    length: int  # the rest of the row is padding
    probabilities: Sequence[Tensor] = ()  # the dense model's, a few positions [positions, vocabulary] each, float32
    entropy: float = 0.0  # their mean over the positions, in nats


class Supernet:
    """A model at any choice of levels, and its divergence from the dense model.

    Between choices only the weights of output projections change, so the model is the caller's own, and a layer is run
    again only if it or one before it differs from the choice that is held.

    Memory: besides the model and the fits, hidden states before every layer, and the dense model's probabilities of all
    tokens at every position.

    Args:
        model: the dense causal LM, in memory and inside `packed_attention`. Its output projections are overwritten.
        blocks: with their widths.
        fits: of every block.
        parts: texts that count alike, as documents.
    """

    def __init__(self, model: Any, blocks: Sequence[Block], fits: Fits, parts: Sequence[Sequence[Document]]) -> None:
        self.blocks, self.evaluations = blocks, 0
        self._model, self._fits = model, fits
        self._modules = [model.get_submodule(f"model.layers.{b.layer}.{_OUTPUTS[b.kind]}") for b in blocks]
        self._applied = self._held = tuple(0 for _ in blocks)
        with torch.inference_mode():
            self._rows = [self._enter(documents) for documents in parts]

    @torch.inference_mode()
    def divergence(self, levels: Levels) -> float:
        """Mean Kullback-Leibler divergence of the next token from the dense model's, in nats; parts count alike."""
        self.evaluations += 1
        self._apply(levels)
        first = self._first_changed(levels)
        divergences = [self._cross_entropy(row, self._run(row, first)[-1]) - row.entropy for row in self._rows]
        return sum(divergences) / len(divergences)

    @torch.inference_mode()
    def hold(self, levels: Levels) -> None:
        """Keep the hidden states of a choice, from which others differ little."""
        self._apply(levels)
        first = self._first_changed(levels)
        for row in self._rows:
            row.states[first + 1 :] = self._run(row, first)[1:]
        self._held = levels

    def _enter(self, documents: Sequence[Document]) -> _Row:
        states, arguments = enter(self._model, **packed_inputs(self._model, documents))
        row = _Row(arguments, [states], sum(map(len, documents)))
        row.states = self._run(row, 0)
        row.probabilities = [logprobs.exp() for logprobs in self._logprobs(row, row.states[-1])]
        row.entropy = self._cross_entropy(row, row.states[-1])
        return row

    def _first_changed(self, levels: Levels) -> int:
        """The first layer that differs from the held model's; the number of layers if none does."""
        changed = [b.layer for b, old, new in zip(self.blocks, self._held, levels, strict=True) if old != new]
        return min(changed, default=len(layers_of(self._model)))

    def _apply(self, levels: Levels) -> None:
        for index, (old, new) in enumerate(zip(self._applied, levels, strict=True)):
            if old != new:
                fitted, weight = self._fits[index][new], self._modules[index].weight
                weight.zero_()
                weight[:, fitted.inputs] = fitted.weight
        self._applied = levels

    def _run(self, row: _Row, first: int) -> list[Tensor]:
        """Hidden states before layer `first` and after every layer from there."""
        states = [row.states[first]]
        for number, layer in layers_of(self._model).forward():
            if number >= first:
                states.append(caller(layer, row.arguments[number])(states[-1]))
        return states

    def _logprobs(self, row: _Row, states: Tensor) -> Iterator[Tensor]:
        """Log-probabilities of every next token, float32 [positions, vocabulary], a few positions at a time."""
        for part in self._model.get_decoder().norm(states)[0, : row.length].split(_POSITIONS):
            yield head_logits(self._model, part).float().log_softmax(-1)

    def _cross_entropy(self, row: _Row, states: Tensor) -> float:
        """Mean cross-entropy of the dense model's next token, in nats, given the states after the last layer."""
        parts = zip(row.probabilities, self._logprobs(row, states), strict=True)
        return -sum(float(torch.dot(own.flatten(), logprobs.flatten())) for own, logprobs in parts) / row.length
