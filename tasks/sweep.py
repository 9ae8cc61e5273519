"""Stage: write the report of a sweep, with its table and curves."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from prefect import State

from tailored_llama.config import SweepConfig
from tailored_llama.evaluation import SweepBenchmarkRow, SweepRow, SweptModel, measure
from tailored_llama.reports import sweep
from tailored_llama.store import ArtifactRef, ArtifactStore
from tasks._pages import show_report
from tasks._results import MeasuredModel, SweptCell
from tasks._stage import open_store, reference, stage, task
from tasks.report import folders, labelled


@task("sweep report")
def write_sweep(config: SweepConfig, cells: Sequence[SweptCell]) -> State[ArtifactRef]:
    """Write the report; dense models come first, then every cell."""
    store = open_store(config.store)
    inputs: dict[str, ArtifactRef] = {}
    for number, cell in enumerate(cells):
        for prefix, model in (("", cell.model), (" dense", cell.dense)):
            inputs |= dict(labelled(f"{number}{prefix}", model)) if model else {}
    fields = config.model_dump(mode="json", exclude={"execution", "store"})
    fields["cells"] = [_plain(cell) for cell in cells]
    state = stage(
        sweep,
        config.store,
        fields,
        inputs,
        lambda out, progress: sweep.write_sweep(config, list(_rows(store, cells)), out=out),
    )
    show_report(store, reference(state), "sweep", "sweep", "Every setting, and the curves")
    return state


def _plain(cell: SweptCell) -> dict[str, Any]:
    """The fields of a cell without its artifacts, which are inputs."""
    return {name: value for name, value in asdict(cell).items() if name not in ("model", "dense")}


def _rows(store: ArtifactStore, cells: Sequence[SweptCell]) -> Iterator[tuple[SweepRow, list[SweepBenchmarkRow]]]:
    """One row for all seeds of a setting, and one for each cell that failed."""
    settings: dict[SweepRow, list[SweptCell]] = {}
    for cell in cells:
        settings.setdefault(SweepRow(cell.label, cell.ratio, cell.curve, cell.place), []).append(cell)
    for row, members in settings.items():
        complete = [(cell, cell.model, cell.dense) for cell in members if cell.model and cell.dense]
        if complete:
            models = [_opened(store, model, cell) for cell, model, _ in complete]
            yield measure(row, models, [_opened(store, dense) for _, _, dense in complete])
        for cell in members:
            if cell.error is not None:
                label = f"{row.label}, seed={cell.seed}" if len(members) > 1 else row.label
                yield SweepRow(label, row.ratio, error=cell.error), []


def _opened(store: ArtifactStore, model: MeasuredModel, cell: SweptCell | None = None) -> SweptModel:
    templates = cell.templates if cell else {}
    assert model.perplexity  # a cell has all of its measurements, or an error
    return SweptModel(
        store.open(model.checkpoint), store.open(model.perplexity), folders(store, model.scores), templates
    )
