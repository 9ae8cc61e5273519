"""The settings of adapters, beside the artifacts that they are made from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from tailored_llama.config import AdapterConfig, Metric, RunConfig, named_benchmark, narrow, with_defaults
from tailored_llama.data import headline_metric


@dataclass(frozen=True)
class TuneSettings:
    """The settings of an adapter."""

    adapter: AdapterConfig  # adapter, optimiser, epochs and patience
    metrics: tuple[tuple[str, Metric], ...]  # headlines, in the order in which benchmarks give their parts of examples
    shots: int | None  # examples to train on, of all benchmarks together; None: all that are rendered
    held_out: int  # examples to stop on and to compare with
    seed: int  # of the adapter, the order and dropout

    @classmethod
    def of(cls, config: RunConfig, names: Sequence[str]) -> Self:
        """For benchmarks by name."""
        tuning = config.tuning
        adapter = with_defaults(narrow(tuning, AdapterConfig), *(() if tuning.held_out else ("patience",)))
        metrics = tuple((name, headline_metric(named_benchmark(config, name))) for name in names)
        counts = [config.shots_of(named_benchmark(config, name)) for name in names]
        shots = None if None in counts else counts[0]
        return cls(adapter, metrics, shots, tuning.held_out, config.seed)
