"""Stage: the table and the curves of a sweep."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefect.states import State

from tailored_llama import sweep_report, sweeps
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.sweeps import BenchmarkRow, Made, Row, SweepConfig
from tasks._pages import show_report
from tasks._stage import open_store, stage, task

VERSION = 5


@task("sweep report")
def write_sweep(config: SweepConfig, made: Sequence[Mapping[str, Any]]) -> State[ArtifactRef]:
    """Write the report.

    Args:
        config: the sweep's.
        made: every dense model (its ratio is 0), then every cell: "label", "ratio", "curve", "place", "seed", and
            either "checkpoint", "perplexity", "scores" (by benchmark), "dense" (these of its dense model, with the
            cell's prompts) and "templates" (by benchmark, where they were searched for), or "error".
    """
    store = open_store(config.store)
    named = ("label", "ratio", "curve", "place")

    def folders(model: Mapping[str, Any]) -> Made:
        scores = {name: store.open(ref) for name, ref in model["scores"].items()}
        place, perplexity = store.open(model["checkpoint"]), store.open(model["perplexity"])
        return Made(place, perplexity, scores, model.get("templates"))

    def rows() -> Iterator[tuple[Row, list[BenchmarkRow]]]:
        """One for all seeds of a setting, and one for each cell that failed."""
        settings: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for cell in made:
            settings.setdefault(tuple(cell[name] for name in named), []).append(cell)
        for setting, cells in settings.items():
            row = Row(**dict(zip(named, setting, strict=True)))
            if whole := [cell for cell in cells if "error" not in cell]:
                yield sweeps.measure(row, [folders(c) for c in whole], [folders(c["dense"]) for c in whole])
            for cell in cells:
                if "error" in cell:
                    label = f"{row.label}, seed={cell['seed']}" if len(cells) > 1 else row.label
                    yield Row(label, row.ratio, error=cell["error"]), []

    inputs = {
        f"{number} {of}{name}": ref
        for number, cell in enumerate(made)
        for of, model in (("", cell), ("dense ", cell.get("dense", {})))
        for name, ref in {**model, **model.get("scores", {})}.items()
        if isinstance(ref, ArtifactRef)
    }
    slice_ = config.model_dump(mode="json", exclude={"execution", "store"})
    slice_["cells"] = [{name: cell.get(name) for name in (*named, "seed", "templates", "error")} for cell in made]

    state = stage(
        config.store, "sweep", VERSION, slice_, inputs, lambda out: sweep_report.write_sweep(config, list(rows()), out)
    )
    show_report(store, state.data, "sweep", "sweep", "Every setting, and the curves")
    return state
