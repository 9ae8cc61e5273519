"""Stage: tune one adapter, for one benchmark or for several."""

from collections.abc import Mapping

from prefect import State

from tailored_llama.config import RunConfig, named_benchmark
from tailored_llama.data import headline_metric
from tailored_llama.store import ArtifactRef
from tailored_llama.training import tuning
from tasks._stage import execution_of, open_store, stage, task


@task("tune {label} @ {ratio:.2f}", on_device=True, frugal=True)
def tune(
    config: RunConfig,
    label: str,
    ratio: float,
    pruned: ArtifactRef,
    prompts: Mapping[str, ArtifactRef],
    teachers: Mapping[str, ArtifactRef],
    text: ArtifactRef | None,
) -> State[ArtifactRef]:
    """`prompts` are the train prompts by benchmark; `teachers` and `text` come from the dense model."""
    store = open_store(config.store)
    metrics = {name: headline_metric(named_benchmark(config, name)) for name in prompts}
    fields = tuning.key_fields(config, metrics, bool(teachers), text is not None)
    inputs = {"pruned": pruned} | {f"prompts {name}": ref for name, ref in prompts.items()}
    inputs |= {f"teacher {name}": ref for name, ref in teachers.items()}
    if text:
        inputs["text"] = text

    def source(name: str) -> tuning.Source:
        teacher = store.open(teachers[name]) if name in teachers else None
        return tuning.Source(store.open(prompts[name]), metrics[name], teacher)

    return stage(
        tuning,
        config.store,
        fields,
        inputs,
        lambda out, progress: tuning.tune(
            store.open(pruned),
            [source(name) for name in prompts],
            store.open(text) if text else None,
            tuning=config.tuning,
            distillation=config.distillation,
            seed=config.seed,
            out=out,
            execution=execution_of(config),
            quantization=config.model.quantization,
            resume=store.resume_folder(tuning.STAGE, tuning.VERSION, fields, inputs),
            progress=progress,
        ),
        on=config,
    )
