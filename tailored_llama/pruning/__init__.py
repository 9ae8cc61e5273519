"""Coupled groups, their importance, the plan, reconstruction and surgery."""

from tailored_llama.pruning import allocation, groups, importance, prune, vocabulary
from tailored_llama.pruning.groups import read_groups
from tailored_llama.pruning.importance import IMPORTANCE_SCHEMA
from tailored_llama.pruning.plan import read_plan
from tailored_llama.pruning.prune import check_ratio

__all__ = [
    "IMPORTANCE_SCHEMA", "allocation", "check_ratio", "groups", "importance", "prune", "read_groups", "read_plan",
    "vocabulary",
]  # fmt: skip
