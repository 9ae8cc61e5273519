# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from .groups import build_graph as build_graph
from .groups import read_groups as read_groups
from .importance import score_importance as score_importance
from .prune import check_ratio as check_ratio
from .prune import prune_model as prune_model
from .settings import CountSettings as CountSettings
from .settings import ImportanceSettings as ImportanceSettings
from .settings import PruneSettings as PruneSettings
from .settings import SplitSettings as SplitSettings
from .split import choose_split as choose_split
from .surgery import prune_checkpoint as prune_checkpoint
from .vocabulary import VocabularyPlan as VocabularyPlan
from .vocabulary import count_tokens as count_tokens
from .vocabulary import enough_tokens as enough_tokens
from .vocabulary import tokens_for_texts as tokens_for_texts
