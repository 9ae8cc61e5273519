"""The executor of flows: every node is a Prefect task, in the flow's process or on workers.

The artifact store is the only cache: a task whose artifact exists ends in the state `Cached`, without doing work.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from prefect import State, Task, get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.context import FlowRunContext
from prefect.runtime import task_run
from prefect.states import Completed

from tailored_llama import pipeline
from tailored_llama.config import ExecutionConfig, StoreConfig
from tailored_llama.console import progress_bar, quiet_libraries
from tailored_llama.errors import InputError, is_transient, redacted
from tailored_llama.memory import out_of_memory
from tailored_llama.store import ArtifactRef
from tasks._dispatch import Batches, Waiting, dispatch, open_store, pool_limit
from tasks._pages import PAGES, show_report
from tasks._sigterm import heed_sigterm

RETRY_AFTER = (10, 60, 300)  # seconds


class PrefectExecutor(pipeline.Executor):
    """Makes every node as a Prefect task of the flow that is under way.

    With `execution.dispatch` or several `execution.processes` it works ahead. A node waits in a thread for its inputs,
    and for the worker or the process that computes it.
    """

    def __init__(self, store: StoreConfig, execution: ExecutionConfig) -> None:
        super().__init__(ahead=execution.dispatch is not None or execution.processes > 1)
        self.store, self.execution = store, execution
        self._batches = Batches(pool_limit(execution.dispatch)) if execution.dispatch else None

    def begin(self, *values: Any) -> None:
        if self._batches:  # local nodes first: an order names what its nodes read, and waits for it
            nodes = pipeline.in_order(pipeline.nodes_in(values))
            for node in nodes:
                self._batches.add(node)
            super().begin([node for node in nodes if not self._batches.behind[node.id]])
        super().begin(*values)

    def start(self, node: pipeline.Node) -> Any:
        if not self.ahead:
            return super().start(node)
        elsewhere = None
        if self._batches and node.stage.on_device:
            (batch,) = self._batches.behind[node.id]
            elsewhere = partial(dispatch, node=node, batch=batch, result=self.result, store=self.store)
        checks = [self._begin(check) for check in node.checks]
        later = node.with_inputs(lambda leaf: self._begin(leaf) if isinstance(leaf, pipeline.Node) else leaf)
        submit = _task(node.stage.name).submit
        return submit(later.after(), self.store, self.execution, elsewhere, wait_for=checks)

    def make(self, node: pipeline.Node) -> Any:
        return _task(node.stage.name)(node, self.store, self.execution, return_state=True).result()

    def folder(self, made: Any) -> Path:
        return open_store(self.store).open(made)


def run_stage(
    node: pipeline.Node, store: StoreConfig, execution: ExecutionConfig, elsewhere: Callable[..., bool] | None = None
) -> State[ArtifactRef]:
    """Find or build the artifact of a node, here or on a worker, with `elsewhere`; the state carries its reference."""
    artifacts, frugal = open_store(store), _frugal(execution)
    dispatched = elsewhere is not None and elsewhere(node, execution=frugal)
    with progress_bar(node.name) as progress:
        ref, found = pipeline.build(node, artifacts, store.downloads, frugal, progress, _check)
    told = f"{node.name}: built by a worker" if dispatched else pipeline.describe(node, artifacts.manifest(ref), found)
    get_run_logger().info("%s", told)
    if ref.stage in PAGES:
        show_report(artifacts, ref)
    state = "Dispatched" if dispatched else "Cached" if found else "Completed"
    return Completed(name=state, message=f"{ref.stage} {ref.key[:12]}", data=ref)


def _check() -> None:
    """End a stage whose flow has been stopped."""
    flow = FlowRunContext.get()
    if flow and isinstance(flow.task_runner, Waiting):
        flow.task_runner.check()


def _frugal(execution: ExecutionConfig) -> ExecutionConfig:
    """The execution settings of this try; every retry of a task takes less memory."""
    tries = task_run.run_count or 1
    if tries == 1:
        return execution
    budget = max(64, (execution.batch_tokens or 2048) // 2 ** (tries - 1))
    return execution.model_copy(update={"batch_tokens": budget, "recompute_activations": True})


@cache
def _task(stage: str) -> Any:
    declared = pipeline.STAGES[stage]
    return Task(
        run_stage,
        name=stage,
        task_run_name="{node.name}",
        cache_policy=NO_CACHE,  # the store is the cache
        retries=len(RETRY_AFTER),
        retry_delay_seconds=list(RETRY_AFTER),
        retry_jitter_factor=0.2,
        retry_condition_fn=partial(is_retryable, declared.on_device and not declared.timed),
    )


def is_retryable(frugal: bool, task: Any, run: TaskRun, state: State[Any]) -> bool:
    """Return whether a retry may succeed: memory ran out in a stage that can take less, or the failure is transient."""
    error = state.data
    if not isinstance(error, Exception):
        return False
    if (frugal and out_of_memory(error)) or is_transient(error):
        return True
    if not isinstance(error, InputError | pipeline.Cancelled):  # Prefect logs no traceback here
        get_run_logger().error("another try would not help", exc_info=error)
    return False


def _tidy(record: logging.LogRecord) -> bool:
    """Redact secrets: Prefect logs parameters that it refuses. Drop the traceback where the message is complete."""
    record.msg, record.args = redacted(record.getMessage()), None
    if record.exc_info and isinstance(record.exc_info[1], InputError | pipeline.IncompleteRun):
        record.exc_info = None  # the user's value is wrong, or a stage has logged its own
    elif record.exc_info:
        record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
    return True


for _name in ("task_runs", "flow_runs", "task_engine", "flow_engine", "flows"):
    logging.getLogger(f"prefect.{_name}").addFilter(_tidy)

quiet_libraries()
logging.getLogger("tailored_llama").setLevel(logging.INFO)  # shown by Prefect's logging.extra_loggers

heed_sigterm()
