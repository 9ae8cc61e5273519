"""One model over several devices: its decoder layers, in order, on one device after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import dispatch_model


def spread(model: Any, devices: Sequence[str]) -> None:
    """Put a model on several devices, about the same bytes on each; no layer is split.

    The first device also has embeddings, last norm and head. So `model.device` is where token ids are read and where
    losses, logits and the states after the last layer are, as on a single device. accelerate's hooks move what a layer
    reads to its device; what it returns stays there until the next one reads it.

    Args:
        model: a causal LM in memory, with or without a PEFT adapter.
        devices: at least two.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    sizes = [_bytes(layer) for layer in decoder.layers]
    numbers = shares(sizes, _bytes(base) - sum(sizes), len(devices))
    outside = [f"model.{name}" for name, _ in decoder.named_children() if name != "layers"] + ["lm_head"]
    places = dict.fromkeys(outside, devices[0])
    places |= {f"model.layers.{layer}": devices[number] for layer, number in enumerate(numbers)}
    dispatch_model(base, places, main_device=devices[0], skip_keys=base._skip_keys_device_placement)
    if hasattr(model, "prompt_encoder"):  # a soft prompt, which is outside the base
        model.prompt_encoder.to(devices[0])


def shares(layers: Sequence[int], rest: int, count: int) -> list[int]:
    """The number of the device of every layer, ascending, so that devices have about the same bytes.

    Args:
        layers: the size of each.
        rest: the size of everything else, which is on the first device; if that alone is more than a device's share,
            the first device has no layer.
        count: of devices, at least two.
    """
    share = (sum(layers) + rest) / count
    before = float(rest)
    if rest >= share:
        before = share = sum(layers) / (count - 1)
    numbers = []
    for size in layers:
        numbers.append(min(int((before + size / 2) / share), count - 1))
        before += size
    return numbers


def _bytes(module: Any) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
