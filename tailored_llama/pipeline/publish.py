"""Publishing the answer of a search, if it is better than the last one that was published."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from tailored_llama.errors import InputError, is_transient
from tailored_llama.pipeline.reporting import CERTIFICATE
from tailored_llama.store import publish, published_file

log = logging.getLogger(__name__)

RETRY_AFTER = (10, 60, 300)  # seconds; what a server refuses now it may take in a minute
_GOAL = ("margin_points", "measure", "confidence")


def publish_answer(target: str, model: Path | None) -> None:
    """Publish the proven model of a search, if there is one, and it is smaller than the one there, or loses less.

    Raises:
        InputError: as `published_file` and `publish`; or the model there is proven for another goal.
        UnreachableError: the Hub does not answer, after further tries.
    """
    if model is None:
        return log.info("nothing is published, as nothing is proven; what is at %s stays", target)
    for pause in RETRY_AFTER:
        try:
            return _publish(target, model)
        except Exception as error:
            if not is_transient(error):
                raise
            log.warning("publishing is tried again in %d seconds: %s", pause, error)
            time.sleep(pause)
    return _publish(target, model)


def _publish(target: str, model: Path) -> None:
    new, there = json.loads((model / CERTIFICATE).read_bytes()), published_file(target, CERTIFICATE)
    if there is not None:
        last = _read(there, target)
        if (goal := _goal_of(new)) != (other := _goal_of(last)):
            raise InputError(
                f"store.publish: {target} has a model for another goal ({other}, here {goal}); allowed: a place for "
                "each goal"
            )
        if _rank(new) >= _rank(last):
            log.info("not published: %s, and that at %s, %s, stays", _figures(new), target, _figures(last))
            return
    publish(model, target, new["claim"])
    log.info("published to %s: %s", target, _figures(new))


def _read(certificate: bytes, target: str) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(certificate)
        _rank(read), _goal_of(read)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"store.publish: the {CERTIFICATE} at {target} is not one; allowed: a new place") from None
    return read


def _goal_of(certificate: dict[str, Any]) -> str:
    margin, measure, confidence = (certificate[name] for name in _GOAL)
    return f"{margin:g} points of {measure} at {100 * confidence:g} % on {', '.join(sorted(certificate['benchmarks']))}"


def _rank(certificate: dict[str, Any]) -> tuple[int, float]:
    """Bytes, then the loss on the worst benchmark: the lower the better."""
    return certificate["model"]["bytes"], max(test["loss"] for test in certificate["benchmarks"].values())


def _figures(certificate: dict[str, Any]) -> str:
    size, loss = _rank(certificate)
    return f"{size:,} bytes, {100 * loss:.2f} points lost"
