"""Stage: one LoRA adapter, for one benchmark or for several."""

from collections.abc import Mapping

from prefect.states import State

from tailored_llama import tuning
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.benchmarks import headline_metric
from tailored_llama.config import RunConfig, read_fields
from tasks._progress import stage_progress
from tasks._stage import OnDevice, execution_of, open_store, stage, task

VERSION = 4


@task("tune {label} @ {ratio:.2f}", frugal=True)
def tune(
    config: RunConfig,
    label: str,
    ratio: float,
    pruned: ArtifactRef,
    prompts: Mapping[str, ArtifactRef],
    teachers: Mapping[str, ArtifactRef],
    text: ArtifactRef | None = None,
) -> State[ArtifactRef]:
    """`prompts` are the train prompts by benchmark; `teachers`, of the same, and `text` what distillation asks for."""
    store, taught = open_store(config.store), config.distillation
    metrics = {name: headline_metric(next(b for b in config.benchmarks if b.name == name)) for name in prompts}
    slice_ = read_fields(config.tuning) | {"seed": config.seed}
    inputs = {"pruned": pruned} | {f"prompts {name}": ref for name, ref in prompts.items()}
    if config.tuning.ranking:
        slice_["metrics"] = metrics
    if len(prompts) > 1:  # each gives a part, the first ones perhaps one more
        slice_ |= {"shots": config.tuning.shots, "held_out": config.tuning.held_out, "order": list(prompts)}
    if teachers:
        slice_ |= {"weight": taught.weight, "temperature": taught.temperature}
        inputs |= {f"teacher {name}": ref for name, ref in teachers.items()}
    if text:
        slice_["sequences"] = taught.sequences
        inputs["text"] = text

    def source(name: str) -> tuning.Source:
        teacher = store.open(teachers[name]) if name in teachers else None
        return tuning.Source(store.open(prompts[name]), metrics[name], teacher)

    resume = store.resume_folder("adapter", VERSION, slice_, inputs)
    with stage_progress(f"tune {label} @ {ratio}") as progress:
        return stage(
            config.store,
            "adapter",
            VERSION,
            slice_,
            inputs,
            lambda out: tuning.tune(
                store.open(pruned),
                [source(name) for name in prompts],
                config.tuning,
                config.seed,
                out,
                execution_of(config),
                progress,
                taught,
                store.open(text) if text else None,
                resume,
            ),
            OnDevice(config, "tune", {"benchmark": label, "ratio": ratio}),
        )
