"""The compositions as Prefect flows, and the flow that runs single stages of them on a worker."""

from __future__ import annotations

from typing import Annotated

from prefect import flow, get_run_logger
from prefect.runtime import deployment, flow_run
from pydantic import Field

from tailored_llama.config import (
    ExecutionConfig,
    PromptStudyConfig,
    RunConfig,
    SmallestConfig,
    StoreConfig,
    SweepConfig,
    TransferConfig,
)
from tailored_llama.pipeline import COMPOSITIONS, IncompleteRun, run_only
from tailored_llama.store import ArtifactRef
from tasks._dispatch import THREADED, Ordered
from tasks._pages import keep_report
from tasks.publishing import publish
from tasks.runner import PrefectRunner


def run_name() -> str:
    """The name of a new run: flow, model, ratios and benchmarks; or the stage that it runs alone, and the model."""
    config: RunConfig = flow_run.parameters["config"]
    model = config.model.short_name
    if only := flow_run.parameters.get("only"):
        return f"{only}, {model}"
    ratios = ", ".join(f"{ratio:.2f}" for ratio in config.pruning.ratios)
    first, *more = [benchmark.name for benchmark in config.benchmarks]
    return f"{flow_run.flow_name} {model} @ {ratios}: {first}{f' and {len(more)} more' if more else ''}"


Only = Annotated[
    str | None,
    Field(description="Run this stage and what it reads, in the run's process: tune arc_easy @ 0.20. Absent: all."),
]


@flow(flow_run_name=run_name, persist_result=False, task_runner=THREADED)
def tailor(config: RunConfig, only: Only = None) -> ArtifactRef:
    """Prune, tailor, score and report. Every artifact is found or built; cheap stages and checks come first."""
    return compose("tailor", config, only)


@flow(flow_run_name=run_name, persist_result=False, task_runner=THREADED)
def sweep(config: SweepConfig) -> ArtifactRef:
    """Measure every cell of a grid of settings; a failure appears in the table and does not stop the others."""
    return compose("sweep", config)


@flow(flow_run_name=run_name, persist_result=False, task_runner=THREADED)
def transfer(config: TransferConfig) -> ArtifactRef:
    """Tailor to each benchmark, score on all; a failed row or cell appears in the table and stops no other."""
    return compose("transfer", config)


@flow(flow_run_name=run_name, persist_result=False)
def prompts(config: PromptStudyConfig) -> ArtifactRef:
    """Score every template set on a train slice, choose one, and compare it with the references."""
    return compose("prompts", config)


@flow(flow_run_name=run_name, persist_result=False, task_runner=THREADED)
def smallest(config: SmallestConfig) -> ArtifactRef:
    """Find the smallest model that still does the job, prove that it does, and export it with its certificate."""
    report = compose("smallest", config)
    if config.store.publish:
        try:
            publish(config, report)
        except Exception as error:  # the answer is there
            raise IncompleteRun({"publish": error}, report) from error
    return report


FLOWS = {"tailor": tailor, "sweep": sweep, "transfer": transfer, "prompts": prompts, "smallest": smallest}


def compose(name: str, config: RunConfig, only: str | None = None) -> ArtifactRef:
    """Run a composition with its stages as Prefect tasks of the flow that is under way.

    Raises:
        IncompleteRun: at the end, if stages failed.
    """
    composition = COMPOSITIONS[name]
    if deployment.id:  # the command line checks before it starts a run
        composition.check(config)
        for line in composition.announce(config):
            get_run_logger().info("%s", line)
    if only:  # computed in this process: a run that waits for its own pool would hold the pool's only slot
        run = PrefectRunner(config.store, config.execution.model_copy(update={"dispatch": None}))
        return run_only(lambda runner: composition.compose(runner, config), run, only)
    try:
        report = composition.compose(PrefectRunner(config.store, config.execution, config.model.short_name), config)
    except IncompleteRun as error:
        _keep(config, error.report)
        raise
    _keep(config, report)
    return report


def _keep(config: RunConfig, report: ArtifactRef | None) -> None:
    """Copy the report of a deployment's run to the folder of reports; that of other runs the command line copies."""
    if report and deployment.name:
        keep_report(config.store, report, deployment.name)


@flow(persist_result=False)
def stage(calls: list[Ordered], store: StoreConfig, execution: ExecutionConfig) -> None:
    """Run stages that a run leaves to workers (`execution.dispatch`), on the work pool with the device.

    Raises:
        IncompleteRun: some failed; none stops those after it.
    """
    run, failed = PrefectRunner(store, execution), {}
    for call in (ordered.call() for ordered in calls):
        try:
            run(call.stage, call.settings, call.name, **call.inputs)
        except Exception as error:
            failed[call.name] = error
    if failed:
        raise IncompleteRun(failed)
