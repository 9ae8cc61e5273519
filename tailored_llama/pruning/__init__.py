"""Coupled groups, their importance, the plan, reconstruction and surgery."""

from tailored_llama.pruning import groups, importance, prune, vocabulary
from tailored_llama.pruning.groups import read_groups
from tailored_llama.pruning.importance import IMPORTANCE_SCHEMA
from tailored_llama.pruning.plan import read_plan
from tailored_llama.pruning.prune import plan_kept
from tailored_llama.pruning.vocabulary import plan_vocabulary

__all__ = [
    "IMPORTANCE_SCHEMA", "groups", "importance", "plan_kept", "plan_vocabulary", "prune", "read_groups",
    "read_plan", "vocabulary",
]  # fmt: skip
