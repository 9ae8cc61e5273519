# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from .held_out import (
    Comparison as Comparison,
    is_better as is_better,
    read_comparison as read_comparison,
    ships_adapter as ships_adapter,
)
from .loop import (
    LOG_SCHEMA as LOG_SCHEMA,
)
from .distillation import (
    teach as teach,
)
from .healing import (
    heal as heal,
)
from .settings import (
    HealSettings as HealSettings,
    TeachSettings as TeachSettings,
    TuneSettings as TuneSettings,
)
from .tuning import (
    tune as tune,
)
