"""How the parts of a flow end: what there is of them, what failed, and the report of a run that is incomplete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Generic, TypeVar

from prefect import get_run_logger

from tailored_llama.store import ArtifactRef
from tasks._dispatch import Cancelled
from tasks._results import MeasuredModel
from tasks._task import IncompleteRun, result, succeeded

T = TypeVar("T")


class Attempt(Generic[T]):
    """A part of a study that may fail alone: what it is made of, or the error that ended it in this process."""

    def __init__(self, name: str, build: Callable[[], T]) -> None:
        self.name = name
        self.error: Exception | None = None
        try:
            self._value = build()
        except Exception as error:
            get_run_logger().error("%s failed: %s", name, error)
            self.error = error

    @property
    def value(self) -> T:
        """What was built, waited for by nobody.

        Raises:
            Exception: the error that ended it.
        """
        if self.error:
            raise self.error
        return self._value

    def wait(self) -> T | Exception:
        """What was built, with all stages that it is made of; or the first error.

        Raises:
            Cancelled: the flow was cancelled meanwhile.
        """
        try:
            return result(self.value)
        except Cancelled:
            raise
        except Exception as error:
            return error


def parts_of(model: MeasuredModel) -> MeasuredModel | None:
    """What there is of a model's measurements, or None without its checkpoint; waits for its stages."""
    if not succeeded(model.checkpoint):
        return None
    perplexity = model.perplexity if succeeded(model.perplexity) else None
    return replace(model, perplexity=perplexity, scores=succeeding(model.scores))


def succeeding(refs: Mapping[str, ArtifactRef]) -> dict[str, ArtifactRef]:
    """The entries that have not failed; waits for all of them."""
    return {name: ref for name, ref in refs.items() if succeeded(ref)}


def conclude(report: ArtifactRef | None, failed: Mapping[str, Exception]) -> ArtifactRef:
    """The report of a run.

    Raises:
        IncompleteRun: stages failed.
    """
    written = report if succeeded(report) else None
    if failed or written is None:
        raise IncompleteRun(failed, written and result(written))
    return result(written)
