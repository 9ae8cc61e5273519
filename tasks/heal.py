"""Stage: a pruned checkpoint, healed by distillation on plain text."""

from prefect.states import State

from tailored_llama import healing
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tasks._progress import stage_progress
from tasks._stage import OnDevice, execution_of, open_store, stage, task

VERSION = 1


@task("heal @ {ratio:.2f}", frugal=True)
def heal(config: RunConfig, ratio: float, pruned: ArtifactRef, teacher: ArtifactRef) -> State[ArtifactRef]:
    """How much text there is, `teacher` says."""
    store = open_store(config.store)
    slice_ = config.healing.model_dump(mode="json", exclude={"tokens"})
    slice_ |= {"temperature": config.distillation.temperature, "seed": config.seed}
    inputs = {"pruned": pruned, "teacher": teacher}
    resume = store.resume_folder("healed", VERSION, slice_, inputs)
    with stage_progress(f"heal @ {ratio}") as progress:
        return stage(
            config.store,
            "healed",
            VERSION,
            slice_,
            inputs,
            lambda out: healing.heal(
                store.open(pruned),
                store.open(teacher),
                config.healing,
                config.distillation,
                config.seed,
                out,
                execution_of(config),
                progress,
                resume,
            ),
            OnDevice(config, "heal", {"ratio": ratio}),
        )
