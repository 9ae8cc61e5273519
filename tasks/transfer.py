"""Stage: the table and the heat map of a transfer."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefect.states import State

from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tailored_llama.transfer import UNREAD, Cell
from tailored_llama.transfer_report import write_transfer as write
from tasks._pages import show_report
from tasks._stage import open_store, stage, task

VERSION = 2


@task("transfer report")
def write_transfer(config: RunConfig, made: Sequence[Mapping[str, Any]]) -> State[ArtifactRef]:
    """Write the report.

    Args:
        config: the run's.
        made: every cell: "model", "benchmark", and "scores" (an artifact) or "error".
    """
    store = open_store(config.store)

    def cell(found: Mapping[str, Any]) -> Cell:
        folder = store.open(found["scores"]) if "scores" in found else None
        return Cell(found["model"], found["benchmark"], folder, found.get("error"))

    inputs = {f"{found['model']} on {found['benchmark']}": found["scores"] for found in made if "scores" in found}
    slice_ = config.model_dump(mode="json", exclude={"execution", "store", *UNREAD})
    slice_["cells"] = [{name: found.get(name) for name in ("model", "benchmark", "error")} for found in made]
    state = stage(
        config.store,
        "transfer",
        VERSION,
        slice_,
        inputs,
        lambda out: write(config, [cell(found) for found in made], out),
    )
    show_report(store, state.data, "transfer", "transfer", "Each adapter on every benchmark")
    return state
