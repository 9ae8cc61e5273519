"""A proven model is published, if it is better than the one that was published last."""

import logging
import time
from pathlib import Path

from tailored_llama.errors import InputError, is_transient
from tailored_llama.pipeline.certificate import CertificateFile, parse_certificate
from tailored_llama.store import CERTIFICATE, publish, published_file

log = logging.getLogger(__name__)

RETRY_AFTER = (10, 60, 300)  # seconds; what a server refuses now it may take in a minute


def publish_answer(target: str, model: Path | None) -> None:
    """Publish the proven model of a search, if there is one, and it is smaller than the one there, or loses less.

    Raises:
        InputError: as `published_file` and `publish`, after further tries; or the model there is for another goal.
    """
    if model is None:
        return log.info("nothing is published, as nothing is proven; what is at %s stays", target)
    for pause in (*RETRY_AFTER, None):
        try:
            return _publish(target, model)
        except Exception as error:
            if pause is None or not is_transient(error):
                raise
            log.warning("publishing is tried again in %d seconds: %s", pause, error)
            time.sleep(pause)


def _publish(target: str, model: Path) -> None:
    new = parse_certificate((model / CERTIFICATE).read_bytes(), str(model / CERTIFICATE))
    if (there := published_file(target, CERTIFICATE)) is not None:
        try:
            last = parse_certificate(there, CERTIFICATE)
        except InputError as error:
            raise InputError(f"store.publish: got {target}, whose {error} (or publish to a new place)") from None
        if (goal := _goal_of(new)) != (other := _goal_of(last)):
            told = f"{target} has a model for another goal ({other}, here {goal}); allowed: a place for each goal"
            raise InputError(f"store.publish: {told}")
        if _rank(new) >= _rank(last):
            log.info("not published: %s, and that at %s, %s, stays", _figures(new), target, _figures(last))
            return
    publish(model, target, new.claim)
    log.info("published to %s: %s", target, _figures(new))


def _goal_of(certificate: CertificateFile) -> str:
    points, confidence = certificate.margin_points, 100 * certificate.confidence
    return f"{points:g} points of accuracy at {confidence:g} % on {', '.join(sorted(certificate.benchmarks))}"


def _rank(certificate: CertificateFile) -> tuple[int, float]:
    """Bytes, then the loss on the worst benchmark: the lower the better."""
    return certificate.model.bytes, max(test.loss for test in certificate.benchmarks.values())


def _figures(certificate: CertificateFile) -> str:
    size, loss = _rank(certificate)
    return f"{size:,} bytes, {100 * loss:.2f} points lost"
