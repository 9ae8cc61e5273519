"""Stage: count how often the calibration text and the train prompts use each token."""

from collections.abc import Mapping

from prefect import State

from tailored_llama.config import RunConfig
from tailored_llama.pruning import vocabulary
from tailored_llama.store import ArtifactRef
from tasks._stage import open_store, stage, task


@task("count tokens")
def count_tokens(config: RunConfig, dense: ArtifactRef, prompts: Mapping[str, ArtifactRef]) -> State[ArtifactRef]:
    """`prompts` are train prompts, by name; evaluation prompts must not be among them."""
    store = open_store(config.store)
    return stage(
        vocabulary,
        config.store,
        vocabulary.key_fields(config),
        {"dense": dense, **prompts},
        lambda out, progress: vocabulary.count_tokens(
            store.open(dense),
            [store.open(ref) for ref in prompts.values()],
            calibration=config.calibration,
            downloads=config.store.downloads,
            out=out,
        ),
    )
