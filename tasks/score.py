"""Stages: a checkpoint scored on a benchmark, and its perplexity."""

from prefect import task
from prefect.states import State

from tailored_llama import scoring, texts
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.benchmarks import headline_metric
from tailored_llama.config import RunConfig
from tailored_llama.console import progress_bar
from tasks._stage import open_store, stage

VERSION = 1


@task(task_run_name="score {benchmark} {label}")
def score(
    config: RunConfig,
    benchmark: str,
    label: str,
    checkpoint: ArtifactRef,
    prompts: ArtifactRef,
    adapter: ArtifactRef | None = None,
) -> State[ArtifactRef]:
    store = open_store(config.store)
    own = next(b for b in config.benchmarks if b.name == benchmark)
    inputs = {"checkpoint": checkpoint, "prompts": prompts} | ({"adapter": adapter} if adapter else {})
    with progress_bar(f"score {benchmark} {label}") as progress:
        return stage(
            config.store,
            "scores",
            VERSION,
            {"benchmark": benchmark, "metric": headline_metric(own)},
            inputs,
            lambda out: scoring.score_benchmark(
                store.open(checkpoint),
                store.open(adapter) if adapter else None,
                store.open(prompts),
                own,
                out,
                config.execution,
                progress,
            ),
        )


@task(task_run_name="perplexity {label}")
def measure_perplexity(config: RunConfig, label: str, checkpoint: ArtifactRef) -> State[ArtifactRef]:
    store, text = open_store(config.store), config.perplexity
    with progress_bar(f"perplexity {label}") as progress:
        return stage(
            config.store,
            "perplexity",
            VERSION,
            {
                "text": texts.text_identity(text),
                "window": text.window,
                "tokens": text.tokens,
            },
            {"checkpoint": checkpoint},
            lambda out: scoring.measure_perplexity(
                store.open(checkpoint), text, config.store.downloads, out, config.execution, progress
            ),
        )
