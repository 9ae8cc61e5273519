"""Second moments of what goes into the projections of a model, layer by layer."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear

from tailored_llama.models.packing import Document, batches, packed_attention, packed_inputs, token_budget
from tailored_llama.models.streaming import enter, layers_of

_READS_AS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # the same inputs as another projection


@torch.inference_mode()
def layer_moments(
    model: Any, documents: Sequence[Document], batch_tokens: int | None = None
) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """Every decoder layer with the second moments of its projections' inputs; last, the model with those of its head.

    They are the mean over all tokens of x xᵀ, float32 [inputs, inputs], by the name of the projection in the layer.
    Layers see what the layers before them have become: what is changed in one before the next is asked for.
    """
    layers, rows = layers_of(model), []
    for part in batches([len(document) for document in documents], token_budget(batch_tokens, model)):
        rows.append([documents[i] for i in part])
    seen, arguments = _Seen(), []
    with packed_attention(model), layers.shelf() as shelf:
        for index, row in enumerate(rows):
            shelf[index], further = enter(model, **packed_inputs(model, row))
            arguments.append(further)
        for number, layer in layers.each():
            linear = {name: module for name, module in layer.named_modules() if isinstance(module, Linear)}
            sources = {name: source if (source := _source(name)) in linear else name for name in linear}
            with ExitStack() as hooks:
                for name, module in linear.items():
                    if sources[name] == name:
                        hooks.enter_context(module.register_forward_hook(partial(seen.add, name)))
                for index, row in enumerate(rows):
                    seen.tokens = sum(map(len, row))
                    layer(shelf[index], **arguments[index][number])
            means = seen.take()
            yield layer, {name: means[source] for name, source in sources.items()}
            for index, further in enumerate(arguments):
                shelf[index] = layer(shelf[index], **further[number])
        for index, row in enumerate(rows):
            seen.tokens = sum(map(len, row))
            seen.add("lm_head", None, (model.get_decoder().norm(shelf[index]),), None)
        yield model, seen.take()


def _source(name: str) -> str:
    """The projection that reads what one of this name reads, and whose inputs are watched."""
    module, _, projection = name.rpartition(".")
    return f"{module}.{_READS_AS.get(projection, projection)}"


class _Seen:
    """Sums of x xᵀ by name, of the first `tokens` of every packed row; the others fill it up."""

    def __init__(self) -> None:
        self.tokens, self._count, self._sums = 0, dict[str, int](), dict[str, Tensor]()

    def add(self, name: str, _: Any, read: tuple[Tensor, ...], __: Any) -> None:
        """Hook: add the inputs [1, tokens, inputs] of a projection."""
        inputs = read[0][0, : self.tokens].float()
        if name not in self._sums:
            self._sums[name], self._count[name] = inputs.new_zeros(2 * inputs.shape[1:]), 0
        self._sums[name].addmm_(inputs.T, inputs)
        self._count[name] += self.tokens

    def take(self) -> dict[str, Tensor]:
        """The means, by name, which are then forgotten."""
        means = {name: total.div_(self._count[name]) for name, total in self._sums.items()}
        self._sums, self._count = {}, {}
        return means
