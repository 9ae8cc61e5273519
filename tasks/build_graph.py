"""Stage: the coupled groups of a model; and the check that the asked ratios can be reached."""

import numpy as np
from prefect.states import State

from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tailored_llama.pruning.groups import build_graph as build
from tailored_llama.pruning.groups import read_groups
from tailored_llama.pruning.prune import plan_kept
from tasks._stage import open_store, stage, task

VERSION = 2


@task("build graph")
def build_graph(config: RunConfig, dense: ArtifactRef, ratios: tuple[float, ...] = ()) -> State[ArtifactRef]:
    """Nothing heavy shall run for one of the `ratios` that cannot be reached."""
    artifacts = open_store(config.store)
    state = stage(config.store, "groups", VERSION, {}, {"dense": dense}, lambda out: build(artifacts.open(dense), out))
    groups = read_groups(artifacts.open(state.data))
    for ratio in ratios:
        scores = np.zeros(len(groups))
        plan_kept(artifacts.open(dense), groups, scores, ratio, config.pruning, config.reconstruction.method)
    return state
