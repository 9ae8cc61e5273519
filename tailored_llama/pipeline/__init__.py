"""The stages composed: the whole pipeline and the studies, and the runners that execute them in this process."""

from tailored_llama.pipeline import steps
from tailored_llama.pipeline.compositions import COMPOSITIONS, Composition, run_composition
from tailored_llama.pipeline.runner import (
    Artifact,
    Cancelled,
    Done,
    FolderRunner,
    Future,
    IncompleteRun,
    Runner,
    StoreRunner,
    build,
    describe,
    run_only,
)
from tailored_llama.pipeline.stage import Call, Stage, leaves, map_leaves
from tailored_llama.pipeline.stages import STAGES

__all__ = [
    "COMPOSITIONS", "STAGES", "Artifact", "Call", "Cancelled", "Composition", "Done", "FolderRunner", "Future",
    "IncompleteRun", "Runner", "Stage", "StoreRunner", "build", "describe", "leaves", "map_leaves", "run_composition",
    "run_only", "steps",
]  # fmt: skip
