# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from .bits import (
    BitsRow as BitsRow,
    WHOLE as WHOLE,
    bits_rows as bits_rows,
)
from .pieces import (
    PiecesRow as PiecesRow,
    read_pieces as read_pieces,
)
from .profiling import (
    ProfileRow as ProfileRow,
    read_profile as read_profile,
    token_flops as token_flops,
)
from .prompt_study import (
    Difference as Difference,
    EVALUATION as EVALUATION,
    Studied as Studied,
    TemplateRow as TemplateRow,
    choose as choose,
    read_study as read_study,
    study_differences as study_differences,
    study_rows as study_rows,
)
from .recovery import (
    HEALED as HEALED,
    MEAN as MEAN,
    MODELS as MODELS,
    ModelRow as ModelRow,
    PRUNED as PRUNED,
    RecoveryRow as RecoveryRow,
    RecoveryTable as RecoveryTable,
    TAILORED as TAILORED,
    read_recovery as read_recovery,
    recovery_rows as recovery_rows,
    recovery_tables as recovery_tables,
)
from .scores import (
    compare_scores as compare_scores,
    read_metrics as read_metrics,
    read_score as read_score,
)
from .statistics import (
    Array as Array,
    RESAMPLES as RESAMPLES,
    Z95 as Z95,
    above_floor as above_floor,
)
from .sweep import (
    SweepBenchmarkRow as SweepBenchmarkRow,
    SweepRow as SweepRow,
    SweptModel as SweptModel,
    measure as measure,
    read_sweep as read_sweep,
)
from .transfer import (
    DIFFERENCE as DIFFERENCE,
    OTHERS as OTHERS,
    OWN as OWN,
    TransferCell as TransferCell,
    TransferRow as TransferRow,
    field_of as field_of,
    read_transfer as read_transfer,
    transfer_rows as transfer_rows,
)
from .generation import (
    generate as generate,
)
from .perplexity import (
    measure_perplexity as measure_perplexity,
)
from .pieces import (
    measure_pieces as measure_pieces,
)
from .profiling import (
    profile_checkpoint as profile_checkpoint,
)
from .scoring import (
    score_benchmark as score_benchmark,
)
from .settings import (
    PerplexitySettings as PerplexitySettings,
    PiecesSettings as PiecesSettings,
    ProfileSettings as ProfileSettings,
    ScoreSettings as ScoreSettings,
)
