"""Stage: the table and the curves of a sweep."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.states import State

from tailored_llama import sweep_report, sweeps
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.sweeps import Made, Row, SweepConfig
from tasks._pages import show_report
from tasks._stage import open_store, stage, task

VERSION = 3


@task("sweep report")
def write_sweep(config: SweepConfig, dense: Mapping[str, Any], made: Sequence[Mapping[str, Any]]) -> State[ArtifactRef]:
    """Write the report.

    Args:
        config: the sweep's.
        dense: the dense model's "checkpoint", "perplexity" and "scores" (by benchmark).
        made: every cell: "label", "ratio", "curve", "place", "seed", and either "checkpoint", "perplexity", "scores"
            and "dense" (the dense model's scores with its prompts), or "error".
    """
    store = open_store(config.store)
    named = ("label", "ratio", "curve", "place")

    def folders(cell: Mapping[str, Any]) -> Made:
        scores, dense = ({name: store.open(ref) for name, ref in cell[kind].items()} for kind in ("scores", "dense"))
        return Made(store.open(cell["checkpoint"]), store.open(cell["perplexity"]), scores, dense)

    def rows() -> Iterator[Row]:
        """One for all seeds of a setting, and one for each cell that failed."""
        settings: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for cell in made:
            settings.setdefault(tuple(cell[name] for name in named), []).append(cell)
        for setting, cells in settings.items():
            row = Row(**dict(zip(named, setting, strict=True)))
            if whole := [folders(cell) for cell in cells if "error" not in cell]:
                yield sweeps.measure(row, whole)
            for cell in cells:
                if "error" in cell:
                    label = f"{row.label}, seed={cell['seed']}" if len(cells) > 1 else row.label
                    yield Row(label, row.ratio, error=cell["error"])

    inputs = {
        f"{number} {name}": ref
        for number, cell in enumerate([dense, *made])
        for name, ref in {**cell, **cell.get("scores", {})}.items()
        if isinstance(ref, ArtifactRef)
    }
    inputs |= {f"{n} dense {name}": ref for n, cell in enumerate(made) for name, ref in cell.get("dense", {}).items()}
    slice_ = config.model_dump(mode="json", exclude={"execution", "store"})
    slice_["cells"] = [{name: cell.get(name) for name in (*named, "seed", "error")} for cell in made]

    def build(out: Path) -> None:
        measured = sweeps.measure(Row("dense", 0.0), [folders({**dense, "dense": dense["scores"]})])
        sweep_report.write_sweep(config, measured, list(rows()), out)

    state = stage(config.store, "sweep", VERSION, slice_, inputs, build)
    show_report(store, state.data, "sweep", "sweep", "Every setting, and the curves")
    return state
