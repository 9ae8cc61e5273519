"""Run a model layer by layer, so that memory holds the activations of one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tailored_llama.models import Shelf, enter

_PASS_TOKENS = 4096


@dataclass(frozen=True)
class Text:
    """Calibration sequences, int64 [samples, tokens], and the most tokens of them per pass; None: 4,096."""

    input_ids: Tensor
    batch_tokens: int | None = None

    @property
    def at_once(self) -> int:
        """Sequences per pass: as many as its tokens allow, and 4,096 tokens at most; at least one."""
        return max(1, min(_PASS_TOKENS, self.batch_tokens or _PASS_TOKENS) // self.input_ids.shape[1])

    def batches(self) -> tuple[Tensor, ...]:
        """The sequences of each pass."""
        return tuple(self.input_ids.split(self.at_once))

    def even_batches(self) -> tuple[Tensor, ...]:
        """Batches of the same shape, so that all have the same masks and positions."""
        sizes = (size for size in range(1, self.at_once + 1) if len(self.input_ids) % size == 0)
        return tuple(self.input_ids.split(max(sizes)))


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
