"""Stage: export a finished model as a GGUF file."""

from prefect import State, get_run_logger

from tailored_llama.config import GgufType, RunConfig, export_folders, gguf_folders
from tailored_llama.serving import export
from tailored_llama.store import GGUF, ArtifactRef, place
from tasks._stage import open_store, reference, stage, task


@task("export {benchmark} @ {ratio:.2f}, gguf {gguf_type}")
def export_gguf(
    config: RunConfig, benchmark: str, ratio: float, gguf_type: GgufType, finished: ArtifactRef
) -> State[ArtifactRef]:
    """Write the file, and copy its folder beside the configured one."""
    store, name = open_store(config.store), export_folders(config)[ratio, benchmark].name
    state = stage(
        export,
        config.store,
        export.key_fields(gguf_type, name),
        {"model": finished},
        lambda out, progress: export.export_gguf(
            store.open(finished), gguf_type=gguf_type, name=name, out=out, progress=progress
        ),
    )
    target = gguf_folders(config)[ratio, benchmark, gguf_type]
    place(store.open(reference(state)), target, "store.export", "an exported model", [GGUF])
    get_run_logger().info("finished model: %s", target)
    return state
