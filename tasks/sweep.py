"""Stage: the table and the curves of a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.states import State

from tailored_llama import sweeps
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.sweeps import Row, SweepConfig
from tasks._stage import open_store, stage

VERSION = 1


@task(task_run_name="sweep report")
def write_sweep(config: SweepConfig, made: Sequence[Mapping[str, Any]]) -> State[ArtifactRef]:
    """Write the report.

    Args:
        config: the sweep's.
        made: the dense model, then every cell: "label", "ratio", and "checkpoint", "perplexity" and "scores" (by
            benchmark) artifacts, or "error".
    """
    store = open_store(config.store)

    def row(cell: Mapping[str, Any]) -> Row:
        if "error" in cell:
            return Row(cell["label"], cell["ratio"], error=cell["error"])
        scores = [store.open(ref) for ref in cell["scores"].values()]
        return sweeps.measure(
            cell["label"], cell["ratio"], store.open(cell["checkpoint"]), store.open(cell["perplexity"]), scores
        )

    inputs = {
        f"{number} {name}": ref
        for number, cell in enumerate(made)
        for name, ref in {**cell, **cell.get("scores", {})}.items()
        if isinstance(ref, ArtifactRef)
    }
    slice_ = config.model_dump(mode="json", exclude={"execution", "store"})
    slice_["cells"] = [{name: cell.get(name) for name in ("label", "ratio", "error")} for cell in made]
    state = stage(
        config.store,
        "sweep",
        VERSION,
        slice_,
        inputs,
        lambda out: sweeps.write_sweep(config, row(made[0]), [row(cell) for cell in made[1:]], out),
    )
    rows = sweeps.read_sweep(store.open(state.data))
    create_table_artifact(
        key="sweep",
        table=[{"setting": r.label, "ratio": r.ratio, "perplexity": r.perplexity, "error": r.error} for r in rows],
    )
    return state
