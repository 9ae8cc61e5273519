"""Stage: measure what a pruned checkpoint costs to run, compared with the dense one."""

from prefect import State

from tailored_llama.config import RunConfig
from tailored_llama.evaluation import profiling
from tailored_llama.models import pick_device
from tailored_llama.store import ArtifactRef
from tasks._stage import open_store, stage, task


@task("profile {label}", on_device=True)
def profile(config: RunConfig, label: str, pruned: ArtifactRef, dense: ArtifactRef) -> State[ArtifactRef]:
    """Only this artifact's bytes depend on the machine and the moment; its key includes the device."""
    store, device = open_store(config.store), config.execution.device
    if device == "auto":  # a named device need not exist on a machine that only dispatches
        device = pick_device(device)
    return stage(
        profiling,
        config.store,
        profiling.key_fields(config.profile, device),
        {"checkpoint": pruned, "against": dense},
        lambda out, progress: profiling.profile_checkpoint(
            store.open(pruned),
            store.open(dense),
            profile=config.profile,
            labels={"checkpoint": "pruned", "against": "dense"},
            out=out,
            execution=config.execution,
            progress=progress,
        ),
        on=config,
    )
