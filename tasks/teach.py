"""Stage: record teacher outputs of the dense model on a text or on the shots of a benchmark."""

from prefect import State

from tailored_llama.config import RunConfig, reserved_tokens
from tailored_llama.data import prompts
from tailored_llama.store import ArtifactRef
from tailored_llama.training import distillation
from tasks._stage import execution_of, open_store, stage, task


@task("teach {label}", on_device=True, frugal=True)
def teach(config: RunConfig, label: str, dense: ArtifactRef, source: ArtifactRef) -> State[ArtifactRef]:
    """`source` is a calibration artifact or train prompts; the latter leave room for a soft prompt."""
    store = open_store(config.store)
    reserved = reserved_tokens(config.tuning) if source.stage == prompts.STAGE else 0
    return stage(
        distillation,
        config.store,
        distillation.key_fields(config, reserved),
        {"dense": dense, "source": source},
        lambda out, progress: distillation.teach(
            store.open(dense),
            store.open(source),
            distillation=config.distillation,
            reserved=reserved,
            out=out,
            execution=execution_of(config),
            progress=progress,
        ),
        on=config,
    )
