"""LoRA in bfloat16, with fewer and larger products than PEFT's: projections of one input share what is thin in them.

PEFT computes y + (x·Aᵀ)·Bᵀ·s for each projection, with six thin products and casts of x and y to the adapter's float32.
Here q, k and v (and gate and up) compute x·Aᵀ once for all their adapters, and their gradients by it likewise. Adapters
stay in float32 in the optimiser, and PEFT's in every other way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def join_projections(model: Any) -> None:
    """Let the LoRA layers of a PEFT model compute together where they read the same input; in float32 they do not.

    Layers with dropout, DoRA, or a base that is not a plain linear layer stay as they are.
    """
    from peft.tuners.lora import Linear

    for parent in model.modules():
        plain = {
            name: layer
            for name, layer in parent.named_children()
            if isinstance(layer, Linear) and type(layer.base_layer) is nn.Linear and not layer.lora_variant
            if isinstance(layer.lora_dropout["default"], nn.Identity)
        }
        for names in (*_SAME_INPUT, *((name,) for name in plain.keys() - set(sum(_SAME_INPUT, ())))):
            if layers := [plain[name] for name in names if name in plain]:
                group = _Group(layers)
                for layer in layers:
                    layer.forward = partial(group.forward, layer, layer.forward)  # type: ignore[method-assign]


class _Group(local):
    """LoRA layers that are called one after another with the same input; the first call computes all outputs.

    What it keeps between the calls is that of one thread.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.input: Tensor | None = None
        self.outputs: dict[Any, Tensor] = {}

    def forward(self, layer: Any, alone: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The output of one layer; `alone` is PEFT's own way."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if dtype != torch.bfloat16 or layer.merged or layer.disable_adapters:
            return alone(x)
        if x is not self.input or layer not in self.outputs:
            adapters = [getattr(own, part)["default"].weight for own in self.layers for part in ("lora_A", "lora_B")]
            bases = [own.base_layer for own in self.layers]
            scale = layer.scaling["default"]  # of all layers
            found = _JoinedLora.apply(x.to(dtype), bases, scale, *adapters)  # type: ignore[no-untyped-call]
            self.input, self.outputs = x, dict(zip(self.layers, found, strict=True))
        output = self.outputs.pop(layer)
        if not self.outputs:
            self.input = None
        return output


class _JoinedLora(torch.autograd.Function):
    """x·Wᵀ + bias + (x·Aᵀ)·Bᵀ·scale of several projections of x, in its type; W is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bases: Sequence[nn.Linear], scale: float, *adapters: Tensor) -> Any:
        rows, dtype = x.flatten(0, -2), x.dtype
        down = torch.cat(adapters[::2]).to(dtype)  # of all projections, [Σ rank, in]
        ups = [up.to(dtype) for up in adapters[1::2]]
        weights = [base.weight.to(dtype) for base in bases]
        inner = (rows @ down.T).mul_(scale)
        outputs = []
        for base, weight, up, own in zip(bases, weights, ups, inner.split([up.shape[1] for up in ups], 1), strict=True):
            bias = None if base.bias is None else base.bias.to(dtype)
            outputs.append(linear(rows, weight, bias).addmm_(own, up.T).view(*x.shape[:-1], -1))
        ctx.save_for_backward(rows, inner, down, *ups, *weights)
        ctx.scale, ctx.shape = scale, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, inner, down, *others = ctx.saved_tensors
        ups, weights = others[: len(gradients)], others[len(gradients) :]
        ranks = [up.shape[1] for up in ups]
        own = [gradient.flatten(0, -2) for gradient in gradients]
        of_inner = torch.cat([g @ up for g, up in zip(own, ups, strict=True)], 1).mul_(ctx.scale)
        of_down = (of_inner.T @ rows).float().split(ranks)
        of_ups = [(part.T @ g).T.float() for part, g in zip(inner.split(ranks, 1), own, strict=True)]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = own[0] @ weights[0]
            for g, weight in zip(own[1:], weights[1:], strict=True):
                of_x.addmm_(g, weight)
            of_x = of_x.addmm_(of_inner, down).view(ctx.shape)
        return of_x, None, None, *(part for pair in zip(of_down, of_ups, strict=True) for part in pair)
