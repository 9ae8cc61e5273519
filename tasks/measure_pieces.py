"""Stage: measure what a trimmed vocabulary does to the evaluation prompts and to the perplexity text."""

from collections.abc import Mapping

from prefect import State

from tailored_llama.config import RunConfig
from tailored_llama.evaluation import pieces
from tailored_llama.store import ArtifactRef
from tasks._stage import open_store, stage, task


@task("pieces of texts")
def measure_pieces(
    config: RunConfig, pruned: ArtifactRef, dense: ArtifactRef, prompts: Mapping[str, ArtifactRef]
) -> State[ArtifactRef]:
    """`prompts` are the rendered evaluation prompts, by benchmark."""
    store = open_store(config.store)
    return stage(
        pieces,
        config.store,
        pieces.key_fields(config.perplexity),
        {"pruned": pruned, "dense": dense, **prompts},
        lambda out, progress: pieces.measure_pieces(
            store.open(pruned),
            store.open(dense),
            {name: store.open(ref) for name, ref in prompts.items()},
            text=config.perplexity,
            downloads=config.store.downloads,
            out=out,
        ),
    )
