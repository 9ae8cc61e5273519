"""Values derived from a configuration, without reading any data."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

from tailored_llama.config.execution import GgufType, as_gguf_type
from tailored_llama.config.forms import WRITTEN
from tailored_llama.config.inputs import BenchmarkConfig
from tailored_llama.config.schema import DATA_FREE, RunConfig

Run = TypeVar("Run", bound=RunConfig)


def reads_calibration(run: RunConfig) -> bool:
    """Return whether importance or reconstruction reads the calibration text."""
    return scores_by_text(run) or run.reconstruction.method != "none"


def scores_by_text(run: RunConfig) -> bool:
    """Return whether importance reads the calibration text."""
    return run.pruning.criterion not in DATA_FREE


def trims_vocabulary(run: RunConfig) -> bool:
    """Return whether pruning removes tokens."""
    return "vocabulary" in run.pruning.kinds


def is_written(benchmark: BenchmarkConfig) -> bool:
    """Return whether the model writes the answer instead of ranking choices."""
    return benchmark.metric in WRITTEN


def is_json(benchmark: BenchmarkConfig) -> bool:
    """Return whether the model writes JSON, such as calls of tools."""
    return WRITTEN.get(benchmark.metric) in ("json", "call")


def asks_turns(benchmark: BenchmarkConfig) -> bool:
    """Return whether a base's chat template can ask the rows: they are messages, and no context words them."""
    return benchmark.form == "messages" and benchmark.context in ("user", "prompt")


def stop_strings(benchmark: BenchmarkConfig) -> tuple[str, ...]:
    """Strings that end a written answer; they are not part of it."""
    return ("\n",) if benchmark.stop is None else benchmark.stop


def new_tokens(benchmark: BenchmarkConfig) -> int:
    """The most tokens that a written answer may have."""
    return benchmark.max_new_tokens or 32


def as_shown(run: Run) -> Run:
    """The same run for a report: what says only how and where it works has its defaults."""
    sections = {name: type(getattr(run, name))() for name in ("execution", "store")}
    return run.model_copy(update=sections)


def named_benchmark(run: RunConfig, name: str) -> BenchmarkConfig:
    """The benchmark of this name, which the run must have."""
    return next(benchmark for benchmark in run.benchmarks if benchmark.name == name)


@dataclass(frozen=True)
class Export:
    """A finished model that a run exports, of this name: as a GGUF file of a type, or (None) as a checkpoint."""

    ratio: float
    benchmark: str
    name: str
    type: GgufType | None
    folder: Path


def exports(run: RunConfig) -> list[Export]:
    """Every finished model that a run exports; none without `store.export`."""
    if run.store.export is None:
        return []
    root, exported = Path(run.store.export).expanduser(), []
    for ratio, benchmark, form in product(run.pruning.ratios, run.benchmarks, run.store.export_formats):
        name = f"{benchmark.name.replace(':', '-')}-{ratio:g}"
        kind = None if form == "safetensors" else as_gguf_type(form.removeprefix("gguf:"))
        folder = root / (f"{name}-{kind}-gguf" if kind else name)
        exported.append(Export(ratio, benchmark.name, name, kind, folder))
    return exported
