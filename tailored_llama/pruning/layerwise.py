"""Run a model layer by layer, so that memory holds the activations of one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from tailored_llama.data import sequences_at_once
from tailored_llama.models import Shelf, enter


@dataclass(frozen=True)
class Text:
    """Calibration sequences, int64 [samples, tokens], and the most tokens of them per pass; None: 4,096."""

    input_ids: Tensor
    batch_tokens: int | None = None

    def batches(self) -> tuple[Tensor, ...]:
        """As many sequences at a time as the tokens per pass allow, at least one."""
        return tuple(self.input_ids.split(sequences_at_once(self.input_ids, self.batch_tokens)))

    def even_batches(self) -> tuple[Tensor, ...]:
        """Batches of the same shape, so that all have the same masks and positions."""
        count, largest = len(self.input_ids), sequences_at_once(self.input_ids, self.batch_tokens)
        return tuple(self.input_ids.split(max(size for size in range(1, largest + 1) if count % size == 0)))


def enter_all(model: Any, batches: Sequence[Tensor], shelf: Shelf) -> list[list[dict[str, Any]]]:
    """Put the hidden states before the first layer on a shelf, with the keys (0, batch).

    `batches` are token ids, int64 [samples, tokens] each.

    Returns:
        Every batch's other arguments of each layer: masks and positions.
    """
    arguments = []
    for index, input_ids in enumerate(batches):
        shelf[0, index], further = enter(model, input_ids=input_ids.to(model.device))
        arguments.append(further)
    return arguments


class Seen(NamedTuple):
    """What a module read and wrote in a pass."""

    inputs: Tensor
    outputs: Tensor


@contextmanager
def watching(modules: Iterable[Any]) -> Iterator[dict[Any, Seen]]:
    """What modules read and wrote in their last pass inside the context."""
    seen: dict[Any, Seen] = {}

    def hook(module: Any, inputs: tuple[Tensor], outputs: Tensor) -> None:
        seen[module] = Seen(inputs[0], outputs)

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(hook))
        yield seen
