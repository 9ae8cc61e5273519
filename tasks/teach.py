"""Stage: what the dense model says next, all along a text or the shots of a benchmark."""

from prefect.states import State

from tailored_llama import distillation
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig, reserved_tokens
from tasks._progress import stage_progress
from tasks._stage import OnDevice, execution_of, open_store, stage, task

VERSION = 1


@task("teach {label}", frugal=True)
def teach(config: RunConfig, label: str, dense: ArtifactRef, source: ArtifactRef) -> State[ArtifactRef]:
    """`source` is a calibration artifact, or train prompts."""
    store, asked = open_store(config.store), config.distillation
    soft = source.stage == "prompts" and reserved_tokens(config.tuning)
    reserved = {"reserved": soft} if soft else {}
    with stage_progress(f"teach {label}") as progress:
        return stage(
            config.store,
            "teacher",
            VERSION,
            {"temperature": asked.temperature, "top": asked.top, **reserved},
            {"dense": dense, "source": source},
            lambda out: distillation.teach(
                store.open(dense), store.open(source), asked, out, execution_of(config), progress, **reserved
            ),
            OnDevice(config, "teach", {"source": label}),
        )
