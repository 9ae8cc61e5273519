"""From a model to numbers with intervals: scores, perplexity, costs, recovery and the studies' rows."""

from tailored_llama.evaluation import generation, perplexity, pieces, profiling, scoring
from tailored_llama.evaluation.bits import WHOLE, BitsRow, bits_rows
from tailored_llama.evaluation.pieces import PiecesRow, read_pieces
from tailored_llama.evaluation.profiling import ProfileRow, read_profile, token_flops
from tailored_llama.evaluation.prompt_study import (
    EVALUATION,
    Difference,
    Studied,
    TemplateRow,
    choose,
    read_study,
    study_differences,
    study_rows,
)
from tailored_llama.evaluation.recovery import (
    HEALED,
    MEAN,
    MODELS,
    PRUNED,
    TAILORED,
    ModelRow,
    RecoveryRow,
    RecoveryTable,
    read_recovery,
    recovery_rows,
    recovery_tables,
)
from tailored_llama.evaluation.scores import compare_scores, read_metrics, read_score
from tailored_llama.evaluation.statistics import RESAMPLES, Z95, Array, above_floor
from tailored_llama.evaluation.sweep import SweepBenchmarkRow, SweepRow, SweptModel, measure, read_sweep
from tailored_llama.evaluation.transfer import (
    DIFFERENCE,
    OTHERS,
    OWN,
    TransferCell,
    TransferRow,
    field_of,
    read_transfer,
    transfer_rows,
)

__all__ = [
    "DIFFERENCE", "EVALUATION", "HEALED", "MEAN", "MODELS", "OTHERS", "OWN", "PRUNED", "RESAMPLES", "TAILORED", "WHOLE",
    "Z95", "Array", "BitsRow", "Difference", "ModelRow", "PiecesRow", "ProfileRow", "RecoveryRow", "RecoveryTable",
    "Studied", "SweepBenchmarkRow", "SweepRow", "SweptModel", "TemplateRow", "TransferCell", "TransferRow",
    "above_floor", "bits_rows", "choose", "compare_scores", "field_of", "generation", "measure", "perplexity", "pieces",
    "profiling",
    "read_metrics", "read_pieces", "read_profile", "read_recovery", "read_score", "read_study", "read_sweep",
    "read_transfer", "recovery_rows", "recovery_tables", "scoring", "study_differences", "study_rows", "token_flops",
    "transfer_rows",
]  # fmt: skip
