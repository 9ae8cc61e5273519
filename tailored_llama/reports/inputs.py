"""The inputs of a run's report: folders and figures, all optional except the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailored_llama.config import DENSE, RunConfig
from tailored_llama.errors import InputError
from tailored_llama.evaluation import (
    PRUNED,
    TAILORED,
    ModelRow,
    ProfileRow,
    RecoveryTable,
    read_score,
    recovery_rows,
    recovery_tables,
)


@dataclass(frozen=True)
class ModelResults:
    """The results of one model: its size, its perplexity (the metrics of `measure_perplexity`), and its scores.

    `scores` maps a benchmark's name to the folder that `score_benchmark` wrote.
    """

    parameters: int | None = None
    perplexity: Mapping[str, Any] | None = None
    scores: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResults:
    """The results at one ratio: the pruned model, and what was tuned on it.

    `ratio` is the configured one. `tailored` has the scores with the adapters. `plan` is the folder with
    `plan.parquet`. `logs` maps a benchmark to the adapter's folder with `log.parquet`. `profile` is the cost of the
    pruned model compared with the dense one. `healed_perplexity` is set if healing followed pruning.
    """

    ratio: float | None
    pruned: ModelResults = field(default_factory=ModelResults)
    tailored: Mapping[str, Path] = field(default_factory=dict)
    plan: Path | None = None
    logs: Mapping[str, Path] = field(default_factory=dict)
    profile: Sequence[ProfileRow] = ()
    healed_perplexity: Mapping[str, Any] | None = None

    def speed(self, role: str = "checkpoint") -> ProfileRow | None:
        """The timing at the largest batch, of the pruned model or of the dense one ("against")."""
        return max((row for row in self.profile if row.role == role), key=lambda row: row.batch, default=None)


@dataclass(frozen=True)
class Cost:
    """The cost of one artifact: wall time in seconds, peak resident memory in bytes, and its stage's own figures."""

    stage: str
    label: str
    seconds: float
    peak_memory_bytes: int
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportInputs:
    """All inputs of a report; `importance` has `importance.parquet`, each of `prompts` has `samples.txt`.

    `failed` are the errors of the stages that an incomplete report lacks, by name.
    """

    model: str
    dense: ModelResults
    runs: tuple[RunResults, ...] = ()
    config: RunConfig | None = None
    importance: Path | None = None
    prompts: Mapping[str, Path] = field(default_factory=dict)
    costs: tuple[Cost, ...] = ()
    libraries: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


def scored_runs(inputs: ReportInputs) -> list[tuple[RunResults, RecoveryTable]]:
    """Each ratio that has scores, with its table.

    Raises:
        InputError: scores of a benchmark have different examples or metrics, a file is missing or broken, or no model
            has scores.
    """
    scored = []
    for run in inputs.runs or (RunResults(None),):
        folders = {DENSE: inputs.dense.scores, PRUNED: run.pruned.scores, TAILORED: run.tailored}
        scores = {model: {name: read_score(path) for name, path in paths.items()} for model, paths in folders.items()}
        rows = recovery_rows(scores, run.ratio, inputs.config.seed if inputs.config else 0)
        if rows:
            (table,) = recovery_tables(rows, _model_rows(inputs, run))
            scored.append((run, table))
    if not scored:
        raise InputError("report: no model has scores; allowed: at least one scored benchmark")
    return scored


_SPEEDS = [f"{phase}_speedup{end}" for phase in ("prefill", "decode") for end in ("", "_low", "_high")]


def _model_rows(inputs: ReportInputs, run: RunResults) -> list[ModelRow]:
    """Rows of the dense, the pruned and the healed model of a ratio, as far as they are known."""
    dense, pruned, speed = inputs.dense, run.pruned, run.speed()
    rows = [
        ModelRow(None, DENSE, dense.parameters, (dense.perplexity or {}).get("perplexity")),
        ModelRow(
            run.ratio,
            PRUNED,
            pruned.parameters,
            (pruned.perplexity or {}).get("perplexity"),
            **{field: getattr(speed, field) for field in _SPEEDS if speed},
        ),
    ]
    if run.healed_perplexity:
        rows.append(ModelRow(run.ratio, "healed", pruned.parameters, run.healed_perplexity["perplexity"]))
    return rows
