"""Every stage of the path, declared once: its name, its version, its function, its settings and what it reads.

A declaration is a signature, so that mypy sees a wrong input. Its body is never run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tailored_llama import data, evaluation, models, pruning, serving, training
from tailored_llama.evaluation import MeasuredModel, Proof, SweptCell, TailoredRun, TunedDense
from tailored_llama.pipeline import reporting
from tailored_llama.pipeline.graph import Artifact, Artifacts, Stage, stage
from tailored_llama.store import ANSWER, FINISHED, GGUF


@stage("dense", 6, lambda: models.prepare_dense)
def dense(*, settings: models.DenseSettings) -> None: ...


@stage("examples", 4, lambda: data.load_benchmark)
def examples(*, settings: data.BenchmarkSource) -> None: ...


@stage("prompts", 13, lambda: data.render_prompts)
def prompts(*, settings: data.PromptSettings, examples: Artifact, dense: Artifact | None = None) -> None: ...


@stage("answers", 1, lambda: data.check_answers)
def answers(*, settings: data.AnswersSettings, dense: Artifact, prompts: Artifact) -> None: ...


@stage("tokens", 6, lambda: pruning.count_tokens)
def tokens(*, settings: pruning.CountSettings, dense: Artifact, prompts: Artifacts) -> None: ...


@stage("calibration", 5, lambda: data.load_calibration)
def calibration(*, settings: data.CalibrationSettings, dense: Artifact, prompts: Artifacts) -> None: ...


@stage("groups", 2, lambda: pruning.build_graph)
def groups(*, settings: None = None, dense: Artifact) -> None: ...


@stage("reach", 3, lambda: pruning.check_ratio)
def reach(*, settings: pruning.PruneSettings, dense: Artifact, groups: Artifact, counts: Artifact | None) -> None: ...


@stage("importance", 5, lambda: pruning.score_importance, on_device=True)
def importance(
    *, settings: pruning.ImportanceSettings, dense: Artifact, groups: Artifact, calibration: Artifact | None
) -> None: ...


@stage("split", 4, lambda: pruning.choose_split, on_device=True)
def split(
    *,
    settings: pruning.SplitSettings,
    dense: Artifact,
    groups: Artifact,
    importance: Artifact,
    counts: Artifact,
    prompts: Artifacts,
) -> None: ...


@stage("pruned", 10, lambda: pruning.prune_model, on_device=True)
def pruned(
    *,
    settings: pruning.PruneSettings,
    dense: Artifact,
    groups: Artifact,
    importance: Artifact,
    calibration: Artifact | None,
    split: Artifact | None,
) -> None: ...


@stage("adapter", 14, lambda: training.tune, on_device=True)
def adapter(*, settings: training.TuneSettings, pruned: Artifact, prompts: Artifacts) -> None: ...


@stage("carried", 1, lambda: models.carry_adapter)
def carried(*, settings: None = None, adapter: Artifact, dense: Artifact, trimmed: Artifact) -> None: ...


@stage("scores", 6, lambda: evaluation.score_benchmark, on_device=True, shared=True)
def scores(
    *, settings: evaluation.ScoreSettings, checkpoint: Artifact, adapter: Artifact | None, prompts: Artifact
) -> None: ...


@stage("quantised-scores", 6, lambda: serving.score_quantised, on_device=True)
def quantised(
    *, settings: serving.QuantisedSettings, checkpoint: Artifact, gguf: Artifact, prompts: Artifact
) -> None: ...


@stage("perplexity", 6, lambda: evaluation.measure_perplexity, on_device=True)
def perplexity(
    *, settings: evaluation.PerplexitySettings, checkpoint: Artifact, text_of: Artifact | None = None
) -> None: ...


@stage("tokenizer", 1, lambda: models.read_tokenizer)
def tokenizer(*, settings: None = None, gguf: Artifact) -> None: ...


@stage("served-scores", 2, lambda: serving.score_served)
def served(*, settings: evaluation.ScoreSettings, checkpoint: Artifact, gguf: Artifact, prompts: Artifact) -> None: ...


@stage("speed", 3, lambda: serving.measure_speed, on_device=True, timed=True)
def speed(*, settings: None = None, gguf: Artifact) -> None: ...


@stage(GGUF, 9, lambda: serving.export_gguf, on_device=True)
def gguf(
    *,
    settings: serving.GgufSettings,
    checkpoint: Artifact,
    adapter: Artifact | None = None,
    prompts: Artifacts | None = None,
) -> None: ...


@stage("source", 6, lambda: serving.copy_source)
def source(*, settings: serving.SourceSettings, checkpoint: Artifact, prompts: Artifacts) -> None: ...


@stage(FINISHED, 10, lambda: reporting.export_model)
def finished(
    *,
    settings: reporting.ExportSettings,
    dense: MeasuredModel[Artifact],
    run: TailoredRun[Artifact],
    prompts: Artifacts,
) -> None: ...


@stage("report", 10, lambda: reporting.write_run_report, tolerant=True)
def report(
    *,
    settings: reporting.ReportSettings,
    dense: MeasuredModel[Artifact],
    runs: Sequence[TailoredRun[Artifact]],
    prompts: Artifacts,
    tuned_dense: TunedDense[Artifact],
    failed: Mapping[str, str] | None = None,
) -> None: ...


@stage("sweep", 8, lambda: reporting.write_sweep_report, tolerant=True)
def sweep(*, settings: reporting.SweepSettings, cells: Sequence[SweptCell[Artifact]]) -> None: ...


@stage("smallest", 5, lambda: reporting.write_smallest_report)
def smallest(
    *, settings: reporting.SmallestSettings, proofs: Sequence[Proof[Artifact]], used: Sequence[Artifact]
) -> None: ...


@stage(ANSWER, 7, lambda: reporting.ship_model)
def shipped(
    *,
    settings: reporting.ShipSettings,
    checkpoint: Artifact,
    adapter: Artifact | None,
    gguf: Artifact | None,
    prompts: Artifacts,
    proof: Proof[Artifact],
) -> None: ...


STAGES: dict[str, Stage[Any]] = {own.name: own for own in list(globals().values()) if isinstance(own, Stage)}
