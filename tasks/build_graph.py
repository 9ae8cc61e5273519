"""Stage: find the coupled groups of a model, and check that the configured ratios can be reached."""

import numpy as np
from prefect import State

from tailored_llama.config import RunConfig
from tailored_llama.pruning import groups, plan_kept, plan_vocabulary, read_groups
from tailored_llama.store import ArtifactRef
from tasks._stage import open_store, reference, stage, task


@task("build graph")
def build_graph(
    config: RunConfig, model: ArtifactRef, ratios: tuple[float, ...] = (), counts: ArtifactRef | None = None
) -> State[ArtifactRef]:
    """Find the groups; a ratio that cannot be reached fails here, before any expensive stage.

    `counts` of tokens are read by the kind vocabulary.
    """
    store = open_store(config.store)
    state = stage(
        groups, config.store, {}, {"dense": model}, lambda out, progress: groups.build_graph(store.open(model), out=out)
    )
    table = read_groups(store.open(reference(state)))
    for ratio in ratios:
        checkpoint, scores = store.open(model), np.zeros(len(table))
        tokens = plan_vocabulary(checkpoint, store.open(counts), ratio, config.pruning) if counts else None
        plan_kept(checkpoint, table, scores, ratio, config.pruning, config.reconstruction.method, None, tokens)
    return state
