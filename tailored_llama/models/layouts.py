"""Configurations of pruned models: stock where all layers are alike, else with each layer's own widths."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import MistralConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tailored_llama.models import libraries  # noqa: F401 - before torch
from tailored_llama.models.checkpoints import LAYERED_PREFIX, WIDTHS, Layer, head_dim_of
from tailored_llama.models.modeling_tailored_llama import LAYERED

BY_LAYER = ("layer_types", "no_rope_layers")  # fields of a configuration with one value per layer


def layout_config(dense: dict[str, Any], layers: tuple[Layer, ...]) -> Any:
    """The configuration of a pruned checkpoint: a stock one if all layers are alike, else a per-layer one.

    The stock configurations of Llama and some Gemmas require the head count to divide the hidden size. If it does not,
    a Llama without biases becomes a MistralConfig without a sliding window, which is the same architecture.
    """
    if len(set(layers)) > 1 or not (layers[0].heads and layers[0].channels):
        return layered_config(dense, layers)
    stock = CONFIG_MAPPING[dense["model_type"].removeprefix(LAYERED_PREFIX)]
    common = _common(dense) | _widths(layers[0])
    try:
        return stock(**common)
    except StrictDataclassClassValidationError:
        if stock.model_type == "llama" and not common.get("attention_bias") and not common.get("mlp_bias"):
            return MistralConfig(**(common | {"sliding_window": None}))
        return layered_config(dense, layers)


def layered_config(dense: dict[str, Any], layers: tuple[Layer, ...]) -> Any:
    """The per-layer configuration: global widths stay the dense model's, and each layer states its own."""
    config, _, _ = LAYERED[dense["model_type"].removeprefix(LAYERED_PREFIX)]
    return config(**(_common(dense) | {"per_layer_config": dict(enumerate(map(_widths, layers)))}))


def _widths(layer: Layer) -> dict[str, int]:
    return dict(zip(WIDTHS, astuple(layer), strict=True))


def _common(dense: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dense configuration that every layout keeps, with an explicit head_dim."""
    dropped = {"model_type", "architectures", "auto_map", "per_layer_config", "transformers_version"}
    return {name: value for name, value in dense.items() if name not in dropped} | {"head_dim": head_dim_of(dense)}
