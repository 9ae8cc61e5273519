"""Tailored-LLaMA: prune a LLaMA-family model structurally, tailor it to one benchmark, measure what is left.

Importing the package registers the per-layer LLaMA with transformers' Auto classes, so that every checkpoint made here
loads without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tailored_llama import modeling_tailored_llama as _modeling

AutoConfig.register("tailored_llama", _modeling.TailoredLlamaConfig, exist_ok=True)
AutoModel.register(_modeling.TailoredLlamaConfig, _modeling.TailoredLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(_modeling.TailoredLlamaConfig, _modeling.TailoredLlamaForCausalLM, exist_ok=True)
# save_pretrained then writes auto_map and copies the modelling file beside the weights.
_modeling.TailoredLlamaConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
_modeling.TailoredLlamaModel.register_for_auto_class("AutoModel")  # type: ignore[no-untyped-call]
_modeling.TailoredLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[no-untyped-call]
