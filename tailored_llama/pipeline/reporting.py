"""The last stages: finished models with their cards, and the reports of runs and studies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailored_llama import evaluation, models, reports, training
from tailored_llama.config import PromptStudyConfig, RunConfig, SweepConfig, Work, named_benchmark
from tailored_llama.evaluation import MeasuredModel, StudiedBenchmark, SweptCell, TailoredRun, TransferScore, TunedDense
from tailored_llama.pipeline.stage import leaves, plain
from tailored_llama.store import read_manifest

if TYPE_CHECKING:
    from tailored_llama.evaluation import RecoveryRow, SweepRow


@dataclass(frozen=True)
class ReportSettings:
    """The configuration that a report shows, and the errors of stages that have left no artifact, by name."""

    config: RunConfig
    failed: Mapping[str, str] = field(default_factory=dict)


def write_run_report(
    *,
    dense: MeasuredModel[Path],
    runs: Sequence[TailoredRun[Path]],
    prompts: Mapping[str, Path],
    tuned_dense: TunedDense[Path],
    settings: ReportSettings,
    work: Work,
) -> None:
    """Stage: write the report of a run from what there is of it; `prompts` are the rendered evaluation prompts."""
    read = {"dense": dense, "": runs, "prompts": prompts, "dense, tuned": tuned_dense}
    config = settings.config
    of: Sequence[TailoredRun[Path] | None] = runs or [None]  # without any, the dense model alone
    inputs = reports.ReportInputs(
        config.model.source,
        [reports.run_results(dense, run, tuned_dense.scores, config.seed) for run in of],
        config,
        evaluation.read_metrics(dense.perplexity) if dense.perplexity else {},
        prompts,
        [(label, read_manifest(folder)) for label, folder in leaves(read) if isinstance(folder, Path)],
        settings.failed,
    )
    reports.write_report(inputs, out=work.out)


@dataclass(frozen=True)
class ExportSettings:
    """What the finished model of a benchmark depends on, beside the artifacts: the settings that its card shows."""

    config: RunConfig
    benchmark: str

    def identity(self) -> dict[str, Any]:
        return shown_identity(self.config) | {"benchmark": self.benchmark}


def shown_identity(config: RunConfig) -> dict[str, Any]:
    """The settings without folder names, as the manifest leaves with the model, and what the base's card says."""
    shown = {name: part for name, part in plain(config).items() if name not in ("execution", "store")}
    base = models.base_of(models.find_model(config.model))
    return {"config": reports.without_folders(shown), "base": plain(base)}


def export_model(
    *, dense: MeasuredModel[Path], run: TailoredRun[Path], settings: ExportSettings, work: Work
) -> dict[str, Any]:
    """Stage: write the finished model of a benchmark, with its card: the base with its adapter merged.

    A run in float32 of a model in bfloat16 or float16 exports the model's own type, at half the size.
    With `tuning.keep = "better"`, an adapter that is not better than none on held-out examples is left out. `dense` and
    `run` have the scores and the adapter of the benchmark alone.
    """
    config, benchmark = settings.config, settings.benchmark
    adapter = run.adapters[benchmark]
    tuned = training.ships_adapter(config.tuning, training.read_comparison(adapter))
    base, results = models.base_of(models.find_model(config.model)), reports.run_results(dense, run, {}, config.seed)
    card = reports.tailored_card(results, config, named_benchmark(config, benchmark), base, run.base, tuned)
    models.merge_adapter(run.base, adapter if tuned else None, out=work.out, card=card, half=base.half)
    return {"adapter": "merged" if tuned else "left out: tuning brought nothing on the held-out examples"}


@dataclass(frozen=True)
class SweepSettings:
    """The configuration of a sweep."""

    config: SweepConfig


def write_sweep_report(*, cells: Sequence[SweptCell[Path]], settings: SweepSettings, work: Work) -> None:
    """Stage: write the report of a sweep; dense models come first, then every cell."""
    reports.write_sweep(settings.config, list(_sweep_rows(cells)), out=work.out)


def _sweep_rows(cells: Sequence[SweptCell[Path]]) -> Iterator[tuple[SweepRow, list[RecoveryRow]]]:
    """One row for all seeds of a setting, and one for each cell that failed."""
    settings: dict[SweepRow, list[SweptCell[Path]]] = {}
    for cell in cells:
        settings.setdefault(evaluation.SweepRow(cell.name, cell.ratio, cell.curve, cell.place), []).append(cell)
    for row, members in settings.items():
        measured = [(cell.model, cell.dense) for cell in members if cell.model and cell.dense]
        if measured:
            yield evaluation.measure(row, *map(list, zip(*measured, strict=True)))
        for cell in members:
            if cell.error is not None:
                label = f"{row.label}, seed={cell.seed}" if len(members) > 1 else row.label
                yield evaluation.SweepRow(label, row.ratio, error=cell.error), []


def write_transfer_report(*, scores: Sequence[TransferScore[Path]], settings: ReportSettings, work: Work) -> None:
    """Stage: write the report of a transfer: every model on every benchmark."""
    reports.write_transfer(settings.config, scores, out=work.out)


@dataclass(frozen=True)
class StudySettings:
    """What the report of a prompt study shows beside the scores: its settings, and the scored model in words."""

    config: PromptStudyConfig
    model: str


def write_study_report(*, studied: Sequence[StudiedBenchmark[Path]], settings: StudySettings, work: Work) -> None:
    """Stage: write the report of a prompt study."""
    reports.write_study(settings.config, settings.model, studied, out=work.out)
