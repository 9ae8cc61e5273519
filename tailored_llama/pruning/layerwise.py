"""Run a model layer by layer, so that memory holds the activations of one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tailored_llama.data import sequences_at_once

Forward = Callable[[Tensor], Tensor]  # hidden states before a layer → after it


class _Stop(Exception):
    """Ends a forward pass once the wanted tensors are captured."""


def first_layer_inputs(
    model: Any, input_ids: Tensor, batch_tokens: int | None
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Hidden states before the first layer, by batch, and the other arguments of each layer, by layer.

    All batches have the same shape, so the masks and positions of the first serve for all.
    """
    largest = sequences_at_once(input_ids, batch_tokens)
    size = max(d for d in range(1, largest + 1) if len(input_ids) % d == 0)
    states: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def record_states(module: Any, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        states.append(inputs[0])
        if len(states) > 1:
            raise _Stop

    def record_arguments(module: Any, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        if len(states) == 1:
            arguments.append(keywords)

    layers = model.model.layers
    handles = [layers[0].register_forward_pre_hook(record_states, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(record_arguments, with_kwargs=True) for layer in layers]
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
    """Wrap a layer as a function of its hidden states alone."""

    def forward(states: Tensor) -> Tensor:
        result = layer(states, **arguments)
        after: Tensor = result[0] if isinstance(result, tuple) else result
        return after

    return forward


def observe(
    forward: Forward, modules: list[Any], states: list[Tensor], record: Callable[[Any, Tensor, Tensor], None]
) -> list[Tensor]:
    """Run a layer batch by batch and return its states; `record` gets each module, its inputs and its outputs."""

    def hook(module: Any, inputs: tuple[Tensor], outputs: Tensor) -> None:
        record(module, inputs[0], outputs)

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        return [forward(batch) for batch in states]
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(forward: Forward, module: Any, states: Tensor, before: list[Any]) -> tuple[Tensor, list[Tensor]]:
    """Run a layer up to one module; return that module's inputs, and the outputs of the modules `before` it."""
    captured: list[Tensor] = []
    earlier: list[Tensor] = []

    def stop(module: Any, inputs: tuple[Tensor]) -> None:
        captured.append(inputs[0])
        raise _Stop

    handles = [one.register_forward_hook(lambda module, inputs, outputs: earlier.append(outputs)) for one in before]
    handles.append(module.register_forward_pre_hook(stop))
    try:
        forward(states)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return captured[0], earlier
