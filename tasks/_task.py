"""Prefect tasks as flows call them: one after another in the flow's process, or side by side on workers.

Without `execution.dispatch`, a call runs the task and returns its result. With it, a call returns a `Promise` at once.
Both can be passed to further tasks, so that one composition of a flow serves both. A flow reads a value with `result`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial, wraps
from inspect import signature
from typing import Any, Generic, ParamSpec, TypeVar

from prefect import State, Task, get_run_logger
from prefect.client.schemas.objects import TaskRun
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.utilities.collections import visit_collection

from tailored_llama.config import RunConfig
from tailored_llama.errors import InputError, is_transient
from tailored_llama.memory import out_of_memory
from tasks._dispatch import Cancelled

P = ParamSpec("P")
R = TypeVar("R")

RETRY_AFTER = (10, 60, 300)  # seconds


def task(name: str, on_device: bool = False, frugal: bool = False) -> Callable[[Callable[P, State[R]]], Callable[P, R]]:
    """Make a function a Prefect task that returns what its state carries; transient failures are retried.

    With dispatch, the call returns a `Promise` of that type. A task `on_device` is then submitted to a thread, which
    waits for the worker that computes. Every other task runs in the flow's main thread, unless it has to wait for its
    inputs. Running out of memory is retried only for a `frugal` stage, which follows `execution_of` and takes less the
    next time. The Prefect task itself is the function's attribute `task`.
    """

    def decorate(function: Callable[P, State[R]]) -> Callable[P, R]:
        prefect_task: Any = Task(
            function,
            task_run_name=name,
            retries=len(RETRY_AFTER),
            retry_delay_seconds=list(RETRY_AFTER),
            retry_jitter_factor=0.2,
            retry_condition_fn=partial(_is_retryable, frugal),
        )

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _dispatching():
                result: R = prefect_task(*args, **kwargs).result()
                return result
            needs = list(_promises((args, kwargs)))
            own_args, own_kwargs = visit_collection((args, kwargs), _run_of, return_data=True)
            if on_device or not all(need.done for need in needs):
                run = prefect_task.submit(*own_args, **own_kwargs)
            else:
                run = prefect_task(*own_args, **own_kwargs, return_state=True)
            arguments = signature(function).bind(*args, **kwargs)
            arguments.apply_defaults()
            return Promise(run, needs, lambda: name.format(**arguments.arguments))  # type: ignore[return-value]

        call.task = prefect_task  # type: ignore[attr-defined]
        return call

    return decorate


class Promise(Generic[R]):
    """What a stage will return, or the failure that leaves it without a result.

    Args:
        run: Prefect's future of the stage, or its final state.
        needs: the promises that it reads.
        name: returns the name of its task run.
    """

    def __init__(self, run: PrefectFuture[R] | State[R], needs: list[Promise[Any]], name: Callable[[], str]) -> None:
        self.run, self.needs, self._name = run, needs, name

    @property
    def done(self) -> bool:
        return isinstance(self.run, State) or self.run.wrapped_future.done()  # type: ignore[attr-defined]

    @cached_property
    def state(self) -> State[R]:
        """The last state, waited for: of a stage that could not begin it is pending."""
        if isinstance(self.run, State):
            return self.run
        self.run.wait()
        return self.run.state

    def result(self) -> R:
        """Wait for the result; a failure is raised, also that of a stage before this one."""
        if not self.state.is_final():
            for need in self.needs:
                need.result()
        value: R = self.state.result()
        return value

    def failures(self) -> Iterator[tuple[str, Exception]]:
        """The stages that failed, by name, of this one and those before it."""
        if self.state.is_completed():
            return
        if not self.state.is_final():
            for need in self.needs:
                yield from need.failures()
            return
        error = self.state.result(raise_on_failure=False)
        yield self._name(), error if isinstance(error, Exception) else RuntimeError(str(self.state.message))

    def __str__(self) -> str:
        return str(self.result())


class IncompleteRun(RuntimeError):
    """Raised at the end of a run of which some stages failed.

    Args:
        failed: each failure, by the name of its stage or of the cell that lacks it.
        report: the report of what there is, if there is one.
    """

    def __init__(self, failed: Mapping[str, Exception], report: Any = None) -> None:
        self.failed, self.report = failed, report
        super().__init__("; ".join(f"{name}: {error}" for name, error in failed.items()))


def result(value: R) -> R:
    """What a task returned, waited for; also within dataclasses, mappings and sequences.

    Raises:
        Exception: the first failure.
    """
    found: R = visit_collection(
        value, lambda part: part.result() if isinstance(part, Promise) else part, return_data=True
    )
    return found


def failures(value: Any) -> dict[str, Exception]:
    """The stages that failed of all that a value is made of, by name; waits for all of them.

    Raises:
        Cancelled: the flow was cancelled meanwhile.
    """
    found = {name: error for promise in _promises(value) for name, error in promise.failures()}
    if cancelled := next((error for error in found.values() if isinstance(error, Cancelled)), None):
        raise cancelled
    return found


def succeeded(value: Any) -> bool:
    """Whether a value has all its parts; waits for all of them."""
    return value is not None and not failures(value)


def _promises(value: Any) -> Iterator[Promise[Any]]:
    found: list[Promise[Any]] = []
    visit_collection(value, lambda part: found.append(part) if isinstance(part, Promise) else None)
    return iter(found)


def _run_of(part: Any) -> Any:
    return part.run if isinstance(part, Promise) else part


def _dispatching() -> bool:
    """Whether the flow that runs here leaves its stages to workers."""
    context = FlowRunContext.get()
    config = (context.parameters or {}).get("config") if context else None
    return isinstance(config, RunConfig) and config.execution.dispatch is not None


def _is_retryable(frugal: bool, task: Any, run: TaskRun, state: State[Any]) -> bool:
    """Whether a retry may succeed: memory ran out in a stage that can take less, or the failure is transient."""
    error = state.data
    if isinstance(error, Exception) and ((frugal and out_of_memory(error)) or is_transient(error)):
        return True
    if isinstance(error, Exception) and not isinstance(error, InputError | Cancelled):  # Prefect logs no traceback here
        get_run_logger().error("another try would not help", exc_info=error)
    return False
