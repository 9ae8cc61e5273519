"""The command line `tailored-llama`."""

from tailored_llama.cli.main import main

__all__ = ["main"]
