"""Futures: what stages return before they have run, and what has become of many of them."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import fields, replace
from threading import Thread
from types import NoneType
from typing import Any, NoReturn, Protocol, TypeVar, get_args

from tailored_llama.errors import one_line
from tailored_llama.pipeline.stage import flatten, is_container, map_leaves
from tailored_llama.store import ArtifactRef

T = TypeVar("T")

log = logging.getLogger(__name__)


class Artifact(Protocol):
    """The future of a reference into the store, or of a folder: compositions only pass it on, or open it."""

    def result(self) -> Any:
        """Wait for the result; a failure is raised, also that of a stage before this one."""

    def failures(self) -> Iterator[tuple[str, Exception]]:
        """Wait; the stages that failed, by name, of this one and those before it."""


class Done:
    """The future of a stage that has succeeded."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value

    def failures(self) -> Iterator[tuple[str, Exception]]:
        return iter(())


class Failed:
    """The future of what has failed in this process."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name, self.error = name, error

    def result(self) -> NoReturn:
        raise self.error

    def failures(self) -> Iterator[tuple[str, Exception]]:
        yield self.name, self.error


class Cancelled(RuntimeError):
    """The run was cancelled while one of its stages was under way."""


class IncompleteRun(RuntimeError):
    """Raised at the end of a run of which some stages failed.

    `failed` are the failures, by the name of the stage or of the cell that lacks it. `report` is of what there is.
    """

    def __init__(self, failed: Mapping[str, Exception], report: ArtifactRef | None = None) -> None:
        self.failed, self.report = failed, report
        super().__init__("; ".join(f"{name}: {error}" for name, error in failed.items()))


class Later:
    """The future of a stage that a thread finds or builds, with `make`; the thread ends with this process.

    What failed among its inputs is its failure, too.
    """

    def __init__(self, name: str, inputs: Mapping[str, Any], make: Callable[[], Any]) -> None:
        self.name, self.inputs, self._made = name, inputs, Future[Any]()
        Thread(target=self._run, args=(make,), daemon=True).start()

    def _run(self, make: Callable[[], Any]) -> None:
        try:
            self._made.set_result(make())
        except BaseException as error:  # a library in Rust panics with one; nothing must wait forever
            self._made.set_exception(error)

    def result(self) -> Any:
        return self._made.result()

    def failures(self) -> Iterator[tuple[str, Exception]]:
        if isinstance(error := self._made.exception(), Exception):
            yield from failures(self.inputs).items() or [(self.name, error)]


def result(value: T) -> T:
    """A value with every future in it, however deep, replaced by its result; the first failure is raised."""
    results: T = map_leaves(lambda leaf: leaf.result() if hasattr(leaf, "failures") else leaf, value)
    return results


def failures(value: Any) -> dict[str, Exception]:
    """The stages that failed of all that a value is made of, by name; waits for all of it. Cancelled is raised."""
    failed: dict[str, Exception] = {}
    for _, leaf in flatten(value):
        if hasattr(leaf, "failures"):
            failed |= leaf.failures()
    if cancelled := next((error for error in failed.values() if isinstance(error, Cancelled)), None):
        raise cancelled
    return failed


def without_failures(value: Any) -> Any:
    """Return nested values without what has failed; waits for all of it.

    What failed is left out of mappings and lists. In a dataclass it is None; if it must not be, so is the dataclass.
    """
    if value is None or hasattr(value, "failures"):
        return None if value is None or failures(value) else value
    if isinstance(value, Mapping):
        return {name: part for name, nested in value.items() if (part := without_failures(nested)) is not None}
    if isinstance(value, list):
        return [part for nested in value if (part := without_failures(nested)) is not None]
    if not is_container(value):
        return value
    parts = {field.name: without_failures(getattr(value, field.name)) for field in fields(value)}
    lost = any(parts[field.name] is None and NoneType not in get_args(field.type) for field in fields(value))
    return None if lost else replace(value, **parts)


def attempt(name: str, build: Callable[[], T]) -> T | Failed:
    """Build a part of a run that may fail alone; if this process fails to, return the failure."""
    try:
        return build()
    except Exception as error:
        log.error("%s failed: %s", name, error)
        return Failed(name, error)


def wait_for_rows(attempts: Iterable[tuple[str, Any, Any]]) -> tuple[list[Any], dict[str, Exception]]:
    """Wait for the rows of a study; returns them, and the failures by name. Cancelled is raised.

    An attempt is a name, an empty row, to which a failure adds its `error`, and what `attempt` made of it.
    """
    rows, failed = [], dict[str, Exception]()
    for name, row, attempted in attempts:
        if errors := failures(attempted):
            failed[name] = next(iter(errors.values()))
            rows.append(replace(row, error=one_line(failed[name])))
        else:
            rows.append(attempted)
    return rows, failed


def report_or_raise(report: Artifact | None, failed: Mapping[str, Exception]) -> ArtifactRef:
    """The reference of a run's report; if stages failed, the report among them, IncompleteRun is raised."""
    lost = failures(report)
    reference: ArtifactRef | None = report.result() if report is not None and not lost else None
    if failed or reference is None:
        raise IncompleteRun({**failed, **lost}, reference)
    return reference
