"""Real models as nodes: which, and how each is made of others."""

from helpers import UNFITTED
from tailored_llama.config import ModelConfig, PlanConfig, PruningConfig, ReconstructionConfig, narrow
from tailored_llama.models import DenseSettings
from tailored_llama.pipeline import stages
from tailored_llama.pipeline.graph import Node
from tailored_llama.pruning import ImportanceSettings, PruneSettings, SplitSettings


def dense(source: str) -> Node:
    """An embedded model in float32."""
    settings = DenseSettings.of(ModelConfig(source=source, dtype="float32"))
    return stages.dense(f"load {source}", settings=settings)


def pruned(
    model: Node,
    ratio: float,
    pruning: PruningConfig,
    text: Node | None = None,
    counts: Node | None = None,
    reconstruction: ReconstructionConfig = UNFITTED,
) -> Node:
    """A dense model pruned by gradients on a text, or else by the size of its weights, which takes seconds.

    With counts of tokens, these leave too.
    """
    by, plan, split = (
        ImportanceSettings("taylor_gate" if text else "magnitude_l2", 0),
        narrow(pruning, PlanConfig),
        None,
    )
    groups = stages.groups("groups", dense=model)
    scores = stages.importance("importance", settings=by, dense=model, groups=groups, calibration=text)
    if counts:
        settings = SplitSettings(ratio, plan)
        split = stages.split(
            "split", settings=settings, dense=model, groups=groups, importance=scores, counts=counts, prompts={}
        )
    return stages.pruned(
        "pruned",
        settings=PruneSettings(ratio, plan, reconstruction),
        dense=model,
        groups=groups,
        importance=scores,
        calibration=text,
        split=split,
    )
