"""Every stage of the path, declared once: its name, its version, its function and its settings."""

from types import NoneType
from typing import Any

from tailored_llama import data, evaluation, models, pruning, serving, training
from tailored_llama.pipeline import reporting
from tailored_llama.pipeline.stage import Stage
from tailored_llama.store import ANSWER, FINISHED, GGUF

DENSE = Stage("dense", 5, lambda: models.prepare_dense, models.DenseSettings)
EXAMPLES = Stage("examples", 2, lambda: data.load_benchmark, data.BenchmarkSource)
PROMPTS = Stage("prompts", 11, lambda: data.render_prompts, data.PromptSettings)
TOKENS = Stage("tokens", 3, lambda: pruning.count_tokens, pruning.CountSettings)
CALIBRATION = Stage("calibration", 4, lambda: data.load_calibration, data.CalibrationSettings)
GROUPS = Stage("groups", 2, lambda: pruning.build_graph, NoneType)
REACH = Stage("reach", 3, lambda: pruning.check_ratio, pruning.PruneSettings)
IMPORTANCE = Stage("importance", 5, lambda: pruning.score_importance, pruning.ImportanceSettings, on_device=True)
SPLIT = Stage("split", 3, lambda: pruning.choose_split, pruning.SplitSettings, on_device=True)
PRUNED = Stage("pruned", 9, lambda: pruning.prune_model, pruning.PruneSettings, on_device=True)
TEACHER = Stage("teacher", 5, lambda: training.teach, training.TeachSettings, on_device=True)
HEALED = Stage("healed", 6, lambda: training.heal, training.HealSettings, on_device=True)
ADAPTER = Stage("adapter", 12, lambda: training.tune, training.TuneSettings, on_device=True)
SCORES = Stage("scores", 5, lambda: evaluation.score_benchmark, evaluation.ScoreSettings, on_device=True, shared=True)
QUANTISED = Stage("quantised-scores", 5, lambda: serving.score_quantised, serving.QuantisedSettings, on_device=True)
PERPLEXITY = Stage(
    "perplexity", 5, lambda: evaluation.measure_perplexity, evaluation.PerplexitySettings, on_device=True
)
SERVED = Stage("served-scores", 1, lambda: serving.score_served, serving.ServedSettings)
PROFILE = Stage(
    "profile", 4, lambda: evaluation.profile_checkpoint, evaluation.ProfileSettings, on_device=True, timed=True
)
FINISHED_MODEL = Stage(FINISHED, 8, lambda: reporting.export_model, reporting.ExportSettings)
GGUF_FILE = Stage(GGUF, 6, lambda: serving.export_gguf, serving.GgufSettings)
SOURCE_FILE = Stage("source", 4, lambda: serving.copy_source, serving.SourceSettings)
REPORT = Stage("report", 9, lambda: reporting.write_run_report, reporting.ReportSettings)
SWEEP = Stage("sweep", 7, lambda: reporting.write_sweep_report, reporting.SweepSettings)
TRANSFER = Stage("transfer", 5, lambda: reporting.write_transfer_report, reporting.ReportSettings)
SPEED = Stage("speed", 3, lambda: serving.measure_speed, NoneType, on_device=True, timed=True)
SHIPPED = Stage(ANSWER, 5, lambda: reporting.ship_model, reporting.ShipSettings)
SMALLEST = Stage("smallest", 4, lambda: reporting.write_smallest_report, reporting.SmallestSettings)
STUDY = Stage("prompt-study", 5, lambda: reporting.write_study_report, reporting.StudySettings)

STAGES: dict[str, Stage[Any]] = {stage.name: stage for stage in list(globals().values()) if isinstance(stage, Stage)}
