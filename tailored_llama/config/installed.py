"""Libraries that only some settings need, and that may be missing."""

from __future__ import annotations

from importlib.util import find_spec

from tailored_llama.config.execution import ExecutionConfig
from tailored_llama.config.training import TrainingConfig
from tailored_llama.errors import InputError


def check_installed(package: str, got: str, otherwise: str, extra: str) -> None:
    """Check that a package is installed that a setting needs.

    Args:
        got: the field and its value, as an error message begins.
        otherwise: a value of the field that needs nothing.
        extra: the extra of this library that brings the package.

    Raises:
        InputError: it is not.
    """
    if not find_spec(package):
        allowed = f"{otherwise!r}, or after pip install 'tailored-llama[{extra}]'"
        raise InputError(f"{got}, which needs {package}; allowed: {allowed}")


def check_training(section: str, training: TrainingConfig, execution: ExecutionConfig) -> None:
    """Check that what a training is asked for is installed: its optimiser, and what its logs are written with.

    Raises:
        InputError: it is not.
    """
    if training.optimizer != "adamw_torch":
        check_installed("bitsandbytes", f"{section}.optimizer: got {training.optimizer!r}", "adamw_torch", "nf4")
    if execution.log_to != "none":
        check_installed(execution.log_to, f"execution.log_to: got {execution.log_to!r}", "none", "logs")
