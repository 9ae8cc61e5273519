# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from .groups import (
    read_groups as read_groups,
)
from .importance import (
    IMPORTANCE_SCHEMA as IMPORTANCE_SCHEMA,
)
from .plan import (
    read_plan as read_plan,
)
from .groups import (
    build_graph as build_graph,
)
from .importance import (
    score_importance as score_importance,
)
from .prune import (
    check_ratio as check_ratio,
    prune_model as prune_model,
)
from .settings import (
    ImportanceSettings as ImportanceSettings,
    PruneSettings as PruneSettings,
)
from .vocabulary import (
    count_tokens as count_tokens,
)
from .settings import (
    CountSettings as CountSettings,
)
