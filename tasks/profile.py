"""Stage: what a pruned checkpoint costs to run, beside the dense one."""

from dataclasses import replace
from pathlib import Path

from prefect.states import State

from tailored_llama import profiling
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tailored_llama.models import pick_device
from tasks._progress import stage_progress
from tasks._stage import OnDevice, open_store, stage, task

VERSION = 1


@task("profile {label}")
def profile(config: RunConfig, label: str, pruned: ArtifactRef, dense: ArtifactRef) -> State[ArtifactRef]:
    """The one artifact whose bytes depend on the machine and the moment; its key holds the device."""
    store, work = open_store(config.store), config.profile
    device = config.execution.device
    if device == "auto":  # one that is named need not be on the machine that only asks for it
        device = pick_device(device)

    def build(out: Path) -> None:
        names = {"checkpoint": "pruned", "against": "dense"}
        folders, sizes = (store.open(pruned), store.open(dense)), (work.batches, work.prompt_tokens, work.new_tokens)
        rows = profiling.profile(*folders, *sizes, device, work.repeats, progress)
        profiling.write_profile([replace(row, checkpoint=names[row.role]) for row in rows], out)

    with stage_progress(f"profile {label}") as progress:
        return stage(
            config.store,
            "profile",
            VERSION,
            work.model_dump(mode="json") | {"device": device},
            {"checkpoint": pruned, "against": dense},
            build,
            OnDevice(config, "profile", {"model": label}),
        )
