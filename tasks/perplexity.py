"""Stage: measure a checkpoint's perplexity on a text."""

from prefect import State

from tailored_llama.config import RunConfig
from tailored_llama.evaluation import perplexity
from tailored_llama.store import ArtifactRef
from tasks._stage import execution_of, open_store, stage, task


@task("perplexity {label}", on_device=True, frugal=True)
def measure_perplexity(
    config: RunConfig, label: str, checkpoint: ArtifactRef, text_of: ArtifactRef | None = None
) -> State[ArtifactRef]:
    """`text_of` is the dense model of one whose vocabulary was trimmed: its tokens say where the text ends."""
    store = open_store(config.store)
    return stage(
        perplexity,
        config.store,
        perplexity.key_fields(config.perplexity),
        {"checkpoint": checkpoint} | ({"text of": text_of} if text_of else {}),
        lambda out, progress: perplexity.measure_perplexity(
            store.open(checkpoint),
            store.open(text_of) if text_of else None,
            text=config.perplexity,
            downloads=config.store.downloads,
            out=out,
            execution=execution_of(config),
            progress=progress,
        ),
        on=config,
    )
