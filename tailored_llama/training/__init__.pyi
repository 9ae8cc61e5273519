# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from .records import LOG_SCHEMA as LOG_SCHEMA
from .records import Comparison as Comparison
from .records import is_better as is_better
from .records import read_comparison as read_comparison
from .records import ships_adapter as ships_adapter
from .settings import TuneSettings as TuneSettings
from .tuning import tune as tune
