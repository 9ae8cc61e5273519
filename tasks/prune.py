"""Stage: plan the pruning and write the pruned checkpoint."""

from prefect import State

from tailored_llama.config import RunConfig
from tailored_llama.models import read_structure
from tailored_llama.pruning import prune as pruning
from tailored_llama.store import ArtifactRef
from tasks._stage import execution_of, open_store, stage, task


@task("prune @ {ratio:.2f}", on_device=True, frugal=True)
def prune(
    config: RunConfig,
    ratio: float,
    model: ArtifactRef,
    groups: ArtifactRef,
    importance: ArtifactRef,
    calibration: ArtifactRef | None,
    dense: ArtifactRef,
    counts: ArtifactRef | None = None,
) -> State[ArtifactRef]:
    """`ratio` is of the parameters of `dense`; only reconstruction depends on `calibration`.

    `counts` of tokens are read by the kind vocabulary.
    """
    store = open_store(config.store)
    original = read_structure(store.open(dense))
    text = None if config.reconstruction.method == "none" else calibration
    return stage(
        pruning,
        config.store,
        pruning.key_fields(config, ratio, original.parameters),
        {"dense": model, "groups": groups, "importance": importance}
        | ({"calibration": text} if text else {})
        | ({"counts": counts} if counts else {}),
        lambda out, progress: pruning.prune(
            store.open(model),
            store.open(groups),
            store.open(importance),
            store.open(text) if text else None,
            ratio=ratio,
            pruning=config.pruning,
            reconstruction=config.reconstruction,
            counts=store.open(counts) if counts else None,
            original=original.size,
            out=out,
            execution=execution_of(config),
            progress=progress,
        ),
        on=config,
    )
