"""Training an adapter: tuning, healing and distillation."""

from tailored_llama.training import distillation, healing, soft_labels, tuning
from tailored_llama.training.loop import LOG_SCHEMA

__all__ = ["LOG_SCHEMA", "distillation", "healing", "soft_labels", "tuning"]
