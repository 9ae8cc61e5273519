"""A model run layer by layer, so that the activations of one layer at a time are in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tailored_llama.calibration import sequences_at_once

Forward = Callable[[Tensor], Tensor]  # a layer's hidden states before → after


class _Stop(Exception):
    """Ends a forward pass as soon as what is wanted of it is known."""


def first_layer_inputs(
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


def caller(layer: Any, arguments: dict[str, Any]) -> Forward:
    """A layer as a function of its hidden states alone."""

    def forward(states: Tensor) -> Tensor:
        result = layer(states, **arguments)
        after: Tensor = result[0] if isinstance(result, tuple) else result
        return after

    return forward


def observe(
    forward: Forward, modules: list[Any], states: list[Tensor], see: Callable[[Any, Tensor, Tensor], None]
) -> list[Tensor]:
    """Run a layer, batch by batch; `see` is given each of the modules, its inputs and its outputs. The states after."""

    def hook(module: Any, given: tuple[Tensor], outputs: Tensor) -> None:
        see(module, given[0], outputs)

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        return [forward(batch) for batch in states]
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(forward: Forward, module: Any, states: Tensor, before: list[Any]) -> tuple[Tensor, list[Tensor]]:
    """What a module of a layer is given, and what modules `before` it give on the way; no further than that."""
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
