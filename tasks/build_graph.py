"""Stage: find the coupled groups of a model, and check that the configured ratios can be reached."""

from prefect import State

from tailored_llama.config import RunConfig
from tailored_llama.pruning import check_ratio, groups
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
    for ratio in ratios:
        check_ratio(
            store.open(model), store.open(reference(state)), store.open(counts) if counts else None, ratio, config
        )
    return state
