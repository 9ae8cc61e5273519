"""Tailored-LLaMA: prune a LLaMA-family model structurally, tailor it to one benchmark, measure what is left.

Importing the package registers the per-layer models with transformers' Auto classes, so that every checkpoint made here
loads without `trust_remote_code`. That happens as soon as transformers is imported: it takes seconds, and much of the
package does not need it.
"""

import importlib
import os
from types import ModuleType

import wrapt
from lazy_loader import attach_stub

# OpenMP's threads spin while they wait. Beside another process that makes torch several times slower; waiting passively
# costs a tenth. This has an effect before torch is loaded, and a value of the user's own stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)

MODELLING = "tailored_llama.models.modeling_tailored_llama"


@wrapt.when_imported("transformers")
def _load(module: ModuleType) -> None:
    importlib.import_module(MODELLING)


@wrapt.when_imported(MODELLING)
def _register(modelling: ModuleType) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from tailored_llama.models import FAMILIES

    for config, model, causal_lm in map(modelling.layered, FAMILIES):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
        # save_pretrained then writes auto_map and copies the modelling file beside the weights.
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModel")
        causal_lm.register_for_auto_class("AutoModelForCausalLM")
