"""Imports what stages work with, which takes seconds: once, in the process from which theirs are forked."""

from importlib.util import find_spec

import torch

from tailored_llama.console import quiet_libraries
from tailored_llama.pipeline.stages import STAGES

quiet_libraries()
# PEFT imports bitsandbytes, which looks at each GPU at once; what is forked after that cannot use any.
if not (torch.version.cuda and find_spec("bitsandbytes")):
    import peft  # noqa: F401

    for _stage in STAGES.values():
        _stage.function()
