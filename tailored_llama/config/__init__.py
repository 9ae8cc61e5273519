"""What is asked: the configuration of a run or a study, how it is read, and what follows from it."""

from tailored_llama.config.derived import (
    GENERIC,
    WRITTEN,
    as_shown,
    drops_layers,
    export_folders,
    exported,
    gguf_folders,
    gguf_types,
    healing_text,
    is_written,
    max_new_tokens,
    named_benchmark,
    part_of,
    reads_calibration,
    reads_prompts,
    reads_train,
    reserved_tokens,
    scores_by_text,
    step_ratios,
    stop_strings,
    trims_vocabulary,
    with_template,
)
from tailored_llama.config.evaluation import PerplexityConfig, ProfileConfig
from tailored_llama.config.execution import GGUF_TYPES, K_QUANTS, ExecutionConfig, GgufType, StoreConfig, as_gguf_type
from tailored_llama.config.harness import FUNCTION, PREFIX, HarnessTask, find_task, is_harness_task, task_fields
from tailored_llama.config.inputs import (
    NF4_MULTIPLE,
    PROMPTS,
    BenchmarkConfig,
    CalibrationConfig,
    CalibrationPart,
    Dtype,
    Ignored,
    Metric,
    ModelConfig,
    Quantization,
    TextConfig,
)
from tailored_llama.config.loading import load_config, read_config_data, validate_as, validate_config
from tailored_llama.config.schema import (
    DATA_FREE,
    ROWS,
    Criterion,
    PlanConfig,
    PruningConfig,
    Reconstruction,
    ReconstructionConfig,
    RunConfig,
)
from tailored_llama.config.section import Section, narrow, with_defaults
from tailored_llama.config.studies import (
    DENSE,
    RATIOS,
    REFERENCES,
    SWEEP_FIELDS,
    TUNED_DENSE,
    UNREAD_BY_TRANSFER,
    UNTUNED_MODEL,
    PromptStudyConfig,
    SweepCell,
    SweepConfig,
    check_transfer,
    dense_runs,
    load_study,
    load_sweep,
    load_transfer,
    sweep_cells,
    tuned_dense_cells,
)
from tailored_llama.config.training import AdapterConfig, DistillationConfig, HealingConfig, TrainingConfig, TuningConfig
from tailored_llama.config.work import Work

__all__ = [
    "AdapterConfig", "Ignored", "PlanConfig", "Work", "as_shown", "narrow", "with_defaults",
    "DATA_FREE", "DENSE", "FUNCTION", "GENERIC", "GGUF_TYPES", "K_QUANTS", "NF4_MULTIPLE", "PREFIX", "PROMPTS",
    "RATIOS", "REFERENCES", "ROWS", "SWEEP_FIELDS", "TUNED_DENSE", "UNREAD_BY_TRANSFER",
    "UNTUNED_MODEL", "WRITTEN", "BenchmarkConfig", "CalibrationConfig", "CalibrationPart", "Criterion",
    "DistillationConfig", "Dtype", "ExecutionConfig", "GgufType", "HarnessTask", "HealingConfig", "Metric",
    "ModelConfig", "PerplexityConfig", "ProfileConfig", "PromptStudyConfig", "PruningConfig", "Quantization",
    "Reconstruction", "ReconstructionConfig", "RunConfig", "Section", "StoreConfig", "SweepCell", "SweepConfig",
    "TextConfig", "TrainingConfig", "TuningConfig", "as_gguf_type", "check_transfer", "dense_runs", "drops_layers",
    "export_folders", "exported", "find_task", "gguf_folders", "gguf_types", "healing_text",
    "is_harness_task", "is_written", "load_config", "load_study", "load_sweep", "load_transfer", "max_new_tokens",
    "named_benchmark", "part_of", "read_config_data", "reads_calibration", "reads_prompts", "reads_train",
    "reserved_tokens", "scores_by_text", "step_ratios", "stop_strings",
    "sweep_cells", "task_fields", "trims_vocabulary", "tuned_dense_cells", "validate_as",
    "validate_config", "with_template",
]  # fmt: skip
