"""Stage: heal a pruned checkpoint by distillation on plain text."""

from prefect import State

from tailored_llama.config import RunConfig
from tailored_llama.store import ArtifactRef
from tailored_llama.training import healing
from tasks._stage import execution_of, open_store, stage, task


@task("heal @ {ratio:.2f}", on_device=True, frugal=True)
def heal(config: RunConfig, ratio: float, pruned: ArtifactRef, teacher: ArtifactRef) -> State[ArtifactRef]:
    """Heal on all of the text that `teacher` covers."""
    store, fields = open_store(config.store), healing.key_fields(config)
    inputs = {"pruned": pruned, "teacher": teacher}
    return stage(
        healing,
        config.store,
        fields,
        inputs,
        lambda out, progress: healing.heal(
            store.open(pruned),
            store.open(teacher),
            healing=config.healing,
            distillation=config.distillation,
            seed=config.seed,
            out=out,
            execution=execution_of(config),
            quantization=config.model.quantization,
            resume=store.resume_folder(healing.STAGE, healing.VERSION, fields, inputs),
            progress=progress,
        ),
        on=config,
    )
