"""Stage: score the importance of every coupled group."""

from prefect import State

from tailored_llama.config import DATA_FREE, RunConfig
from tailored_llama.pruning import importance
from tailored_llama.store import ArtifactRef
from tasks._stage import execution_of, open_store, stage, task


@task("importance {config.pruning.criterion}", on_device=True, frugal=True)
def score_importance(
    config: RunConfig, model: ArtifactRef, groups: ArtifactRef, calibration: ArtifactRef | None
) -> State[ArtifactRef]:
    """Only criteria that read calibration text depend on it."""
    store, criterion = open_store(config.store), config.pruning.criterion
    text = None if criterion in DATA_FREE else calibration
    return stage(
        importance,
        config.store,
        importance.key_fields(config),
        {"dense": model, "groups": groups} | ({"calibration": text} if text else {}),
        lambda out, progress: importance.score_importance(
            store.open(model),
            store.open(groups),
            store.open(text) if text else None,
            criterion=criterion,
            seed=config.seed,
            out=out,
            execution=execution_of(config),
            progress=progress,
        ),
        on=config,
    )
