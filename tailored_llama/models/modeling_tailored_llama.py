"""LLaMA-family models whose decoder layers may have different widths (`config.per_layer_config`).

This file is copied into per-layer checkpoints, so that they load with `trust_remote_code=True` where tailored_llama is
not installed. It depends on transformers only. `import tailored_llama` registers the same classes.
"""

from functools import cache
from importlib import import_module
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class LayerConfig:
    """What one decoder layer sees of its model's configuration: its own widths, and all else as it is at the moment.

    transformers' own `per_layer_config[i]` is a copy: `set_attn_implementation()` would not reach it.
    """

    def __init__(self, config: Any, index: int) -> None:
        own = config.per_layer_config[index]
        self.__dict__.update({name: getattr(own, name) for name in WIDTHS}, model_config=config)

    def __getattr__(self, name: str) -> Any:
        if name == "model_config":  # while a copy of this object is being made
            raise AttributeError(name)
        return getattr(self.model_config, name)


class LayeredConfig:
    """Mixin: a configuration whose global widths are the dense model's; each layer's own are in `per_layer_config`."""

    def validate_architecture(self) -> None:
        """Check each layer's heads (stock checks read one head count and want it to divide the hidden size)."""
        for index, layer in enumerate(self.per_layer_config):  # type: ignore[attr-defined]
            heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
            if not kv_heads or heads % kv_heads:
                raise ValueError(f"layer {index}: {heads} query heads; allowed: a multiple of its {kv_heads} KV heads")

    def validate_rope(self) -> None:
        """Check the rotary embedding as the stock configuration does, which may read the dense model's head count."""
        own = dict(self.__dict__)
        self.allow_global_per_layer_attribute_access = True
        try:
            super().validate_rope()  # type: ignore[misc]
        finally:
            self.__dict__ = own


class LayeredModel:
    """Mixin: a stock model that is built without layers, then given layers of their own widths."""

    layer_class: Any

    def __init__(self, config: Any) -> None:
        count, config.num_hidden_layers = config.num_hidden_layers, 0  # stock layers would all have the same width
        config.allow_global_per_layer_attribute_access = True  # YaRN reads the head count, and does not use it
        try:
            super().__init__(config)  # type: ignore[call-arg]
        finally:
            config.num_hidden_layers = count
            del config.__dict__["allow_global_per_layer_attribute_access"]
        decoder: Any = getattr(self, "model", self)
        decoder.rotary_emb.config = LayerConfig(config, 0)
        decoder.layers.extend(self.layer_class(LayerConfig(config, index), index) for index in range(count))
        self.post_init()  # type: ignore[attr-defined]


@cache
def layered(model_type: str) -> tuple[Any, Any, Any]:
    """The layered configuration, model and model with a head of a stock model type."""
    folder = model_type_to_module_name(model_type)
    module: Any = import_module(f"transformers.models.{folder}.modeling_{folder}")
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type].removesuffix("ForCausalLM")

    def derive(mixin: type, base: Any, suffix: str, **attributes: Any) -> Any:
        attributes |= {"__module__": __name__, "__doc__": f"{base.__name__} with layers of different widths."}
        return type(f"Tailored{name}{suffix}", (mixin, base), attributes)

    model = getattr(module, f"{name}TextModel", None) or getattr(module, f"{name}Model")  # Gemma 3's reads images, too
    own = strict(derive(LayeredConfig, model.config_class, "Config", model_type=f"tailored_{model_type}"))
    parts = {"config_class": own, "layer_class": getattr(module, f"{name}DecoderLayer")}
    causal_lm = derive(LayeredModel, getattr(module, f"{name}ForCausalLM"), "ForCausalLM", **parts)
    return own, derive(LayeredModel, model, "Model", **parts), causal_lm


def __getattr__(name: str) -> Any:
    """A class such as TailoredLlamaModel, which a checkpoint's auto_map names."""
    for part, end in enumerate(("Config", "Model", "ForCausalLM")):
        if name.startswith("Tailored") and name.endswith(end):
            stock = getattr(transformers, f"{name.removeprefix('Tailored').removesuffix(end)}ForCausalLM")
            return layered(stock.config_class.model_type)[part]
    raise AttributeError(name)
