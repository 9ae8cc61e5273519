"""Stages of a run that dispatches them (`execution.dispatch`), as a flow on the work pool with the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from prefect import flow
from pydantic import validate_call

from tailored_llama.store import ArtifactRef
from tasks._task import IncompleteRun

Name = Literal[
    "score_importance", "prune", "heal", "teach", "tune", "measure_perplexity", "profile", "score", "score_quantised"
]


@flow(persist_result=False)
def stage(task: Name, arguments: list[dict[str, Any]]) -> None:
    """Run one task of a run's flow, once for each set of arguments that the flow has for it.

    Raises:
        IncompleteRun: some failed; none stops those after it.
    """
    call = _task(task)
    validated, failed = validate_call(call), {}
    for own in arguments:
        try:
            validated(**own)
        except Exception as error:
            failed[call.task.task_run_name.format(**own)] = error  # type: ignore[attr-defined]
    if failed:
        raise IncompleteRun(failed)


def _task(name: Name) -> Callable[..., ArtifactRef]:
    """Load a task, and no library that only another stage needs."""
    match name:
        case "score_importance":
            from tasks.score_importance import score_importance

            return score_importance
        case "prune":
            from tasks.prune import prune

            return prune
        case "heal":
            from tasks.heal import heal

            return heal
        case "teach":
            from tasks.teach import teach

            return teach
        case "tune":
            from tasks.tune import tune

            return tune
        case "measure_perplexity":
            from tasks.perplexity import measure_perplexity

            return measure_perplexity
        case "profile":
            from tasks.profile import profile

            return profile
        case "score":
            from tasks.score import score

            return score
        case "score_quantised":
            from tasks.score_quantised import score_quantised

            return score_quantised
