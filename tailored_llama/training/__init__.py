"""Training an adapter: tuning, healing and distillation."""

from tailored_llama.training import distillation, healing, tuning
from tailored_llama.training.held_out import Comparison, is_better, read_comparison, ships_adapter
from tailored_llama.training.loop import LOG_SCHEMA

__all__ = [
    "LOG_SCHEMA", "Comparison", "distillation", "healing", "is_better", "read_comparison", "ships_adapter", "tuning",
]  # fmt: skip
