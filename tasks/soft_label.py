"""Stage: record what the dense model thinks of the choices of a benchmark's unlabelled prompts."""

from prefect import State

from tailored_llama.config import RunConfig
from tailored_llama.store import ArtifactRef
from tailored_llama.training import soft_labels
from tasks._stage import execution_of, open_store, stage, task


@task("soft-label {benchmark}", on_device=True, frugal=True)
def soft_label(config: RunConfig, benchmark: str, dense: ArtifactRef, prompts: ArtifactRef) -> State[ArtifactRef]:
    """`prompts` are of the split unlabelled."""
    store = open_store(config.store)
    return stage(
        soft_labels,
        config.store,
        soft_labels.key_fields(),
        {"dense": dense, "prompts": prompts},
        lambda out, progress: soft_labels.soft_label(
            store.open(dense), store.open(prompts), out=out, execution=execution_of(config), progress=progress
        ),
        on=config,
    )
