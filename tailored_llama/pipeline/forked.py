"""Imports what stages work with, which takes seconds: once, in the process from which theirs are forked."""

from tailored_llama.console import quiet_libraries
from tailored_llama.pipeline.stages import STAGES

quiet_libraries()
import peft  # noqa: E402, F401

for _stage in STAGES.values():
    _stage.load()
