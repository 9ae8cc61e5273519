"""Stage: all examples of a benchmark as one table."""

from prefect.states import State

from tailored_llama import benchmarks
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import BenchmarkConfig, StoreConfig
from tasks._stage import stage, task

VERSION = 1


@task("load {benchmark.name}")
def load_benchmark(store: StoreConfig, benchmark: BenchmarkConfig) -> State[ArtifactRef]:
    identity = {split: benchmarks.identity(benchmark, split) for split in ("train", "evaluation")}
    return stage(
        store,
        "examples",
        VERSION,
        {"benchmark": benchmark.name, "identity": identity},
        {},
        lambda out: benchmarks.load_benchmark(benchmark, store.downloads, out),
    )
