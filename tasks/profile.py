"""Stage: what a pruned checkpoint costs to run, beside the dense one."""

from dataclasses import replace
from pathlib import Path

from prefect import task
from prefect.states import State

from tailored_llama import profiling
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tailored_llama.console import progress_bar
from tailored_llama.models import pick_device
from tasks._stage import open_store, stage

VERSION = 1


@task(task_run_name="profile {label}")
def profile(config: RunConfig, label: str, pruned: ArtifactRef, dense: ArtifactRef) -> State[ArtifactRef]:
    """The one artifact whose bytes depend on the machine and the moment; its key holds the device."""
    store, work, device = open_store(config.store), config.profile, pick_device(config.execution.device)

    def build(out: Path) -> None:
        names = {"checkpoint": "pruned", "against": "dense"}
        folders, sizes = (store.open(pruned), store.open(dense)), (work.batches, work.prompt_tokens, work.new_tokens)
        rows = profiling.profile(*folders, *sizes, device, work.repeats, progress)
        profiling.write_profile([replace(row, checkpoint=names[row.role]) for row in rows], out)

    with progress_bar(f"profile {label}") as progress:
        slice_ = work.model_dump(mode="json") | {"device": device}
        return stage(config.store, "profile", VERSION, slice_, {"checkpoint": pruned, "against": dense}, build)
