"""lm-evaluation-harness's own command line, with the model `tailored`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from tailored_llama.errors import InputError


def run_lm_eval(arguments: list[str]) -> None:
    """Run the harness's command line; it parses the arguments, and may end the process with a status of its own.

    Args:
        arguments: what follows `lm-eval` on its command line.

    Raises:
        InputError: the harness is not installed, or its model `tailored` cannot be used as the arguments say.
    """
    if find_spec("lm_eval") is None:
        raise InputError("lm-eval: not installed; allowed: pip install 'tailored-llama[lm-eval]'")
    import lm_eval.models  # noqa: F401  registers the harness's own models, which it does only if there are none yet
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "tailored" not in model_registry:  # by its path, as the harness's own: it is imported when it is asked for
        model_registry.register("tailored", target="tailored_llama.serving.lm_eval_model:TailoredLM")
    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()
