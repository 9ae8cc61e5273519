"""Under which terms a checkpoint stands: what its card states, and the files that go with every copy."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from tailored_llama.store import is_hub_id

CARD = "README.md"
LICENCE_FIELDS = ("license", "license_name", "license_link")


def is_licence_file(path: Path) -> bool:
    """Whether a file beside the weights is a licence, or terms or a notice that go with every copy of them."""
    return path.is_file() and re.match(r"(?i)licen[cs]e|notice|use_policy|.*_terms\.", path.name) is not None


def copy_licence(source: Path, target: Path) -> None:
    """Copy the licence that stands beside a checkpoint's weights to another folder."""
    for path in filter(is_licence_file, source.iterdir()):
        shutil.copyfile(path, target / path.name)


def front_matter(card: Path | None) -> dict[str, Any]:
    """The metadata at the start of a card; empty if there is no card or it cannot be read."""
    try:
        return {**(metadata_load(card) or {})} if card and card.is_file() else {}
    except Exception:  # not YAML, not a table or not UTF-8: treated as stating nothing
        return {}


def licence_of(stated: dict[str, Any]) -> dict[str, str]:
    """What a card's metadata states of the licence; nothing, if that is "unknown"."""
    licence = {name: value for name in LICENCE_FIELDS if isinstance(value := stated.get(name), str)}
    if not licence.get("license_link", "https://").startswith("https://"):
        del licence["license_link"]  # a file next to the base's card
    return licence if licence.get("license", "unknown") != "unknown" else {}


def base_model_of(stated: dict[str, Any]) -> str | None:
    """The Hub id of the model that a card's metadata states as the base."""
    parent = stated.get("base_model")
    return parent if isinstance(parent, str) and is_hub_id(parent) else None
