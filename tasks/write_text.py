"""Stage: have the dense model write calibration text."""

from prefect import State

from tailored_llama.config import RunConfig, self_tokens
from tailored_llama.data import self_text
from tailored_llama.store import ArtifactRef
from tasks._stage import execution_of, open_store, stage, task


@task("write text", on_device=True)
def write_text(config: RunConfig, dense: ArtifactRef) -> State[ArtifactRef]:
    """As much as the source `self` gives of the calibration text."""
    store = open_store(config.store)
    return stage(
        self_text,
        config.store,
        self_text.key_fields(config),
        {"dense": dense},
        lambda out, progress: self_text.write_text(
            store.open(dense),
            tokens=self_tokens(config),
            length=config.calibration.tokens,
            seed=config.seed,
            out=out,
            execution=execution_of(config),
            progress=progress,
        ),
        on=config,
    )
