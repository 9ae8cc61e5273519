"""Stage: load all examples of a benchmark into one table."""

from prefect import State

from tailored_llama.config import BenchmarkConfig, StoreConfig
from tailored_llama.data import benchmarks
from tailored_llama.store import ArtifactRef
from tasks._stage import stage, task


@task("load {benchmark.name}")
def load_benchmark(store: StoreConfig, benchmark: BenchmarkConfig) -> State[ArtifactRef]:
    return stage(
        benchmarks,
        store,
        benchmarks.key_fields(benchmark),
        {},
        lambda out, progress: benchmarks.load_benchmark(benchmark, downloads=store.downloads, out=out),
    )
