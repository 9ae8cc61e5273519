"""The versions of libraries that artifacts are made with. Keys do not have them, so machines may mix versions."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from functools import cache

_NAMES = ("torch", "transformers", "peft", "torch-pruning", "datasets", "pyarrow", "tailored-llama")


@cache
def installed_versions() -> dict[str, str]:
    """The installed version of each library that may change an artifact."""
    return {name: importlib.metadata.version(name) for name in _NAMES}


def other_versions(recorded: Mapping[str, str]) -> set[tuple[str, str, str | None]]:
    """Libraries that were recorded in another version than is installed: name, recorded version, installed version."""
    installed = installed_versions()
    pairs = {(name, version, installed.get(name)) for name, version in recorded.items()}
    return {(name, version, own) for name, version, own in pairs if _release(version) != _release(own)}


def _release(version: str | None) -> str:
    """A version without its build tag, such as torch's +cpu."""
    return (version or "").partition("+")[0]
