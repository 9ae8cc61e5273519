"""Adapters: adding, saving, merging and computing them."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tailored_llama.config import Dtype, ExecutionConfig, TrainingConfig
from tailored_llama.models.cards import merged_card
from tailored_llama.models.checkpoints import FUSED, copy_tokenizer, drop_paths, weights_digest
from tailored_llama.models.id_table import TABLE
from tailored_llama.models.load import BASE_FILE, load_model
from tailored_llama.models.sources import CARD, copy_licence


def add_adapter(base: Any, training: TrainingConfig, execution: ExecutionConfig) -> Any:
    """Add a new adapter to a causal LM; returns the PEFT model."""
    from peft import LoraConfig, get_peft_model  # late: most stages need none of it

    settings = LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        lora_dropout=training.dropout,
        use_rslora=training.variant == "rslora",
        use_dora=training.variant == "dora",
        target_modules=_targets(base, training.targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, settings)
    join_projections(model)
    if execution.recompute_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _targets(model: Any, projections: Sequence[str]) -> list[str]:
    """The model's own names of the projections; a fused one stands for its parts."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    fused_names = {part: fused for fused, parts in FUSED.items() for part in parts}
    return sorted({name if name in names else fused_names.get(name, name) for name in projections})


def save_adapter(model: Any, checkpoint: Path, out: Path) -> None:
    """Write an adapter in PEFT's layout, with the digest of the weights it was trained on."""
    model.save_pretrained(out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"].sort()  # a set in PEFT, whose order differs between processes
    config["base_model_name_or_path"] = None  # no local path; base.json identifies the weights
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / BASE_FILE).write_text(json.dumps({"weights": weights_digest(checkpoint)}) + "\n")
    (out / "README.md").write_text(
        "An adapter in PEFT's layout. Load it onto its checkpoint with `PeftModel.from_pretrained`; `base.json` "
        "holds the SHA-256 of that checkpoint's weights.\n"
    )


def merge_adapter(
    checkpoint: Path, adapter: Path | None, *, out: Path, card: str | None = None, half: Dtype | None = None
) -> None:
    """Write a checkpoint and its adapter to an existing folder as one checkpoint, with the same tokenizer and plan.

    The sum is rounded to the checkpoint's type, or, if that is float32, to `half`; so scores may differ from the
    attached adapter's. By default the card is the checkpoint's own, updated to mention the merge. Raises InputError as
    `load_model`.
    """
    model = load_model(checkpoint, adapter)
    if half and model.dtype == torch.float32:
        model.to(getattr(torch, half))
    save_changed(model, checkpoint, out, card)


def save_changed(model: Any, checkpoint: Path, out: Path, card: str | None = None) -> None:
    """Write a checkpoint's model with changed weights, and all else that the checkpoint has."""
    model.save_pretrained(out)
    copy_tokenizer(checkpoint, out)
    copy_licence(checkpoint, out)
    for name in (TABLE, "plan.parquet"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
    drop_paths(out)
    (out / CARD).write_text(card or merged_card(checkpoint), encoding="utf-8")


def join_projections(model: Any) -> None:
    """Let LoRA layers that read the same input share x·Aᵀ in bfloat16; PEFT takes six thin products and casts for each.

    Layers with dropout or DoRA stay as they are. Adapters stay in float32 in the optimiser.
    """
    from peft.tuners.lora import Linear

    for parent in model.modules():
        joinable = {
            name: layer
            for name, layer in parent.named_children()
            if isinstance(layer, Linear) and type(layer.base_layer) is nn.Linear and not layer.lora_variant
            if isinstance(layer.lora_dropout["default"], nn.Identity)
        }
        for names in (*FUSED.values(), *((name,) for name in joinable.keys() - set(sum(FUSED.values(), ())))):
            if layers := [joinable[name] for name in names if name in joinable]:
                group = _Group(layers)
                for layer in layers:
                    layer.forward = partial(group.forward, layer, layer.forward)  # type: ignore[method-assign]


class _Group(local):
    """LoRA layers that a thread calls one after another with the same input; the first call computes all outputs."""

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
            adapters = [getattr(lora, part)["default"].weight for lora in self.layers for part in ("lora_A", "lora_B")]
            bases = [lora.base_layer for lora in self.layers]
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
        for base, weight, up, low in zip(bases, weights, ups, inner.split([up.shape[1] for up in ups], 1), strict=True):
            bias = None if base.bias is None else base.bias.to(dtype)
            outputs.append(linear(rows, weight, bias).addmm_(low, up.T).view(*x.shape[:-1], -1))
        ctx.save_for_backward(rows, inner, down, *ups, *weights)
        ctx.scale, ctx.shape = scale, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, inner, down, *others = ctx.saved_tensors
        ups, weights = others[: len(gradients)], others[len(gradients) :]
        ranks = [up.shape[1] for up in ups]
        flat = [gradient.flatten(0, -2) for gradient in gradients]
        of_inner = torch.cat([g @ up for g, up in zip(flat, ups, strict=True)], 1).mul_(ctx.scale)
        of_down = (of_inner.T @ rows).float().split(ranks)
        of_ups = [(part.T @ g).T.float() for part, g in zip(inner.split(ranks, 1), flat, strict=True)]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = flat[0] @ weights[0]
            for g, weight in zip(flat[1:], weights[1:], strict=True):
                of_x.addmm_(g, weight)
            of_x = of_x.addmm_(of_inner, down).view(ctx.shape)
        return of_x, None, None, *(part for pair in zip(of_down, of_ups, strict=True) for part in pair)
