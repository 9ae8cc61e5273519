"""The way out: checkpoints and adapters for the runtimes that people serve with."""

from tailored_llama.serving import export, quantised
from tailored_llama.serving.gguf import write_gguf
from tailored_llama.serving.gguf_adapter import write_gguf_adapter

__all__ = ["export", "quantised", "write_gguf", "write_gguf_adapter"]
