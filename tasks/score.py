"""Stage: a checkpoint scored on a benchmark."""

from prefect.states import State

from tailored_llama import scoring
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.benchmarks import headline_metric
from tailored_llama.config import RunConfig
from tailored_llama.own import is_written, max_new_tokens, stop_strings
from tailored_llama.prompts import PromptSplit
from tasks._progress import stage_progress
from tasks._stage import OnDevice, execution_of, open_store, stage, task

VERSION = 2


@task("score {benchmark} {label}", frugal=True)
def score(
    config: RunConfig,
    benchmark: str,
    label: str,
    checkpoint: ArtifactRef,
    prompts: ArtifactRef,
    adapter: ArtifactRef | None = None,
    split: PromptSplit = "evaluation",
) -> State[ArtifactRef]:
    store = open_store(config.store)
    own = next(b for b in config.benchmarks if b.name == benchmark)
    inputs = {"checkpoint": checkpoint, "prompts": prompts} | ({"adapter": adapter} if adapter else {})
    written = {"max_new_tokens": max_new_tokens(own), "stop": stop_strings(own)} if is_written(own) else {}
    written |= {"answers": "with their perplexity"} if is_written(own) else {}
    apart = {"split": split} if split != "evaluation" else {}
    with stage_progress(f"score {benchmark} {label}") as progress:
        return stage(
            config.store,
            "scores",
            VERSION,
            {"benchmark": benchmark, "metric": headline_metric(own), **written, **apart},
            inputs,
            lambda out: scoring.score_benchmark(
                store.open(checkpoint),
                store.open(adapter) if adapter else None,
                store.open(prompts),
                own,
                out,
                execution_of(config),
                progress,
                split,
            ),
            OnDevice(config, "score", {"benchmark": benchmark, "model": label}),
        )
