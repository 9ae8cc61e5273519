"""The compositions as Prefect flows, and the flow that runs single stages of them on a worker."""

from typing import Any

from prefect import Flow, flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from prefect.states import Completed

from tailored_llama.config import ExecutionConfig, RunConfig, StoreConfig, resolve
from tailored_llama.pipeline import COMPOSITIONS, IncompleteRun, WaitingForLabels, plan_run, steps
from tailored_llama.store import ArtifactRef
from tasks._dispatch import THREADED, Ordered, nodes_of
from tasks._pages import keep_report, show_labels, show_plan
from tasks.executor import PrefectExecutor


def run_name() -> str:
    """The name of a new run: flow, model, ratios and benchmarks; or the stage that it runs alone, and the model."""
    config: RunConfig = flow_run.parameters["config"]
    model = config.model.short_name
    if only := flow_run.parameters.get("only"):
        return f"{only}, {model}"
    ratios = ", ".join(steps.digits(ratio) for ratio in config.pruning.ratios)
    first, *more = [benchmark.name for benchmark in config.benchmarks]
    return f"{flow_run.flow_name} {model} @ {ratios}: {first}{f' and {len(more)} more' if more else ''}"


WAITING = "WaitingForLabels"  # the state of a search that goes on when rows are labelled; no failure


def _as_flow(name: str) -> Flow[..., Any]:
    """The flow of a composition; Prefect takes its name, its form and what it checks from its function."""
    composition = COMPOSITIONS[name]

    def run(config: Any, only: str | None = None) -> ArtifactRef | State[Any]:
        try:
            return compose(name, config, only)
        except WaitingForLabels as waiting:
            show_labels(waiting)
            return Completed(name=WAITING, message=str(waiting))

    run.__name__ = run.__qualname__ = name
    run.__annotations__["config"] = composition.kind
    run.__doc__ = f"""{composition.about}

    Args:
        only: run this stage and what it reads, in the run's process: tune arc_easy @ 0.20; absent: all
    """
    return flow(flow_run_name=run_name, persist_result=False, task_runner=THREADED)(run)


def compose(name: str, config: RunConfig, only: str | None = None) -> ArtifactRef:
    """Run a composition with its stages as Prefect tasks of the flow that is under way.

    Raises:
        IncompleteRun: at the end, if stages failed.
    """
    composition, config = COMPOSITIONS[name], resolve(config)  # a deployment's files are where it runs
    if deployment.id:  # the command line checks before it starts a run
        composition.check(config)
        for line in composition.announce(config):
            get_run_logger().info("%s", line)
    if only:  # computed in this process: a run that waits for its own pool would hold the pool's only slot
        here = config.execution.model_copy(update={"dispatch": None, "processes": 1})
        return composition.make(PrefectExecutor(config.store, here), config, only)
    try:
        show_plan(plan_run(composition.compose, config))
    except Exception as error:  # the run itself will say what is wrong
        get_run_logger().warning("there is no plan: %s", error)
    try:
        report = composition.make(PrefectExecutor(config.store, config.execution), config)
    except IncompleteRun as error:
        keep_report(config.store, error.report)
        raise
    keep_report(config.store, report)
    return report


FLOWS = {name: _as_flow(name) for name in COMPOSITIONS}
tailor, sweep, smallest = FLOWS.values()  # the entry points of deployments


@flow(persist_result=False)
def stage(calls: list[Ordered], store: StoreConfig, execution: ExecutionConfig) -> None:
    """Run stages that a run leaves to workers (`execution.dispatch`), on the work pool with the device.

    Raises:
        IncompleteRun: some failed; none stops those after it.
    """
    if failed := PrefectExecutor(store, execution).failures(nodes_of(calls)):
        raise IncompleteRun(failed)
