"""Tailored-LLaMA: prune a LLaMA-family model structurally, tailor it to one benchmark, measure what is left.

Importing the package registers the per-layer models with transformers' Auto classes, so that every checkpoint made here
loads without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tailored_llama.models import modeling_tailored_llama as _modeling

for _config, _model, _causal_lm in _modeling.LAYERED.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
    # save_pretrained then writes auto_map and copies the modelling file beside the weights.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _causal_lm.register_for_auto_class("AutoModelForCausalLM")
