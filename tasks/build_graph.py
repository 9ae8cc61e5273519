"""Stage: the coupled groups of the dense model; and the check that the asked ratios can be reached."""

import numpy as np
from prefect import task
from prefect.states import State

from tailored_llama.artifacts import ArtifactRef
from tailored_llama.checkpoints import read_structure
from tailored_llama.config import PruningConfig, StoreConfig
from tailored_llama.pruning.groups import build_graph as build
from tailored_llama.pruning.groups import read_groups
from tailored_llama.pruning.plan import plan
from tasks._stage import open_store, stage

VERSION = 1


@task(task_run_name="build graph")
def build_graph(store: StoreConfig, dense: ArtifactRef, pruning: PruningConfig) -> State[ArtifactRef]:
    artifacts = open_store(store)
    state = stage(store, "groups", VERSION, {}, {"dense": dense}, lambda out: build(artifacts.open(dense), out))
    groups = read_groups(artifacts.open(state.data))
    total = read_structure(artifacts.open(dense)).parameters
    for ratio in pruning.ratios:  # here, so that nothing heavy runs for a ratio that cannot be reached
        plan(groups, np.zeros(len(groups)), total, ratio, pruning)
    return state
