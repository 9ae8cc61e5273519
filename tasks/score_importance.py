"""Stage: score the importance of every coupled group."""

from prefect import State

from tailored_llama.config import RunConfig, drops_layers, scores_by_text
from tailored_llama.pruning import importance
from tailored_llama.store import ArtifactRef
from tasks._stage import execution_of, open_store, stage, task


@task("importance {config.pruning.criterion}", on_device=True, frugal=True)
def score_importance(
    config: RunConfig, model: ArtifactRef, groups: ArtifactRef, calibration: ArtifactRef | None
) -> State[ArtifactRef]:
    """Only what reads calibration text depends on it: most criteria, and the influence of layers."""
    store = open_store(config.store)
    text = calibration if scores_by_text(config) else None
    return stage(
        importance,
        config.store,
        importance.key_fields(config),
        {"dense": model, "groups": groups} | ({"calibration": text} if text else {}),
        lambda out, progress: importance.score_importance(
            store.open(model),
            store.open(groups),
            store.open(text) if text else None,
            criterion=config.pruning.criterion,
            seed=config.seed,
            out=out,
            execution=execution_of(config),
            influence=drops_layers(config),
            progress=progress,
        ),
        on=config,
    )
