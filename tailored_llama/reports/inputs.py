"""The inputs of a run's report: folders and figures, all optional except the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailored_llama import evaluation
from tailored_llama.config import DENSE, TUNED_DENSE, RunConfig
from tailored_llama.errors import InputError
from tailored_llama.evaluation import HEALED, PRUNED, TAILORED, ByType, ModelRow, ProfileRow, RecoveryRow, RecoveryTable
from tailored_llama.training import Comparison, read_comparison


@dataclass(frozen=True)
class ModelResults:
    """The results of one model: its size, its perplexity (the metrics of `measure_perplexity`), and its scores.

    `scores` maps a benchmark's name to the folder that `score_benchmark` wrote. `body` are the parameters without
    embedding and untied head, `vocab_size` the tokens. `quantised` are the scores of its GGUF files, by their type.
    """

    parameters: int | None = None
    perplexity: Mapping[str, Any] | None = None
    scores: Mapping[str, Path] = field(default_factory=dict)
    body: int | None = None
    vocab_size: int | None = None
    quantised: ByType[Path] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResults:
    """The results at one ratio: the pruned model, and what was tuned on it.

    `ratio` is the configured one. `tailored` has the scores with the adapters, `quantised` those of GGUF files, by
    type. `plan` is the pruned model's folder. `logs` maps a benchmark to the adapter's folder with `log.parquet`.
    `profile` is the cost of the pruned model compared with the dense one. `healed` is set if healing followed pruning.
    """

    ratio: float | None
    pruned: ModelResults = field(default_factory=ModelResults)
    tailored: Mapping[str, Path] = field(default_factory=dict)
    plan: Path | None = None
    logs: Mapping[str, Path] = field(default_factory=dict)
    profile: Sequence[ProfileRow] = ()
    healed: ModelResults | None = None
    quantised: ByType[Path] = field(default_factory=dict)

    def comparison(self, benchmark: str) -> Comparison | None:
        """The adapter of a benchmark against none, on held-out examples; that of a mixture is the same for all."""
        adapter = self.logs.get(benchmark) or self.logs.get("mixture")
        return read_comparison(adapter) if adapter else None

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
    """All inputs of a report; each of `prompts` has `prompts.parquet`.

    `tuned_dense` has the scores of the dense model tuned on the same shots, if that was asked. `failed` are the errors
    of the stages that an incomplete report lacks, by name.
    """

    model: str
    dense: ModelResults
    runs: tuple[RunResults, ...] = ()
    config: RunConfig | None = None
    prompts: Mapping[str, Path] = field(default_factory=dict)
    costs: tuple[Cost, ...] = ()
    libraries: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    tuned_dense: Mapping[str, Path] = field(default_factory=dict)


def scored_runs(inputs: ReportInputs) -> list[tuple[RunResults, RecoveryTable]]:
    """Each ratio that has scores, with its table.

    Raises:
        InputError: as `compared_rows`, or no model has scores.
    """
    scored = []
    for run in inputs.runs or (RunResults(None),):
        folders = {DENSE: inputs.dense.scores, TUNED_DENSE: inputs.tuned_dense, PRUNED: run.pruned.scores}
        folders |= {HEALED: run.healed.scores if run.healed else {}, TAILORED: run.tailored}
        for model, by_type in ((DENSE, inputs.dense.quantised), (TAILORED, run.quantised)):
            folders |= {f"{model} {kind}": scores for kind, scores in by_type.items()}
        if rows := compared_rows(inputs, run, folders):
            (table,) = evaluation.recovery_tables(rows, _model_rows(inputs.dense, run))
            scored.append((run, table))
    if not scored:
        raise InputError("report: no model has scores; allowed: at least one scored benchmark")
    return scored


def compared_rows(
    inputs: ReportInputs, run: RunResults, folders: Mapping[str, Mapping[str, Path]]
) -> list[RecoveryRow]:
    """The rows of a run from the score folders of each model and benchmark.

    Raises:
        InputError: scores of a benchmark have different examples or metrics, or a file is missing or broken.
    """
    scores = {
        model: {name: evaluation.read_score(path) for name, path in paths.items()} for model, paths in folders.items()
    }
    return evaluation.recovery_rows(scores, run.ratio, inputs.config.seed if inputs.config else 0)


def _model_rows(dense: ModelResults, run: RunResults) -> list[ModelRow]:
    """Rows of the dense, the pruned and the healed model of a ratio, as far as they are known."""
    models = {DENSE: dense, PRUNED: run.pruned} | ({HEALED: run.healed} if run.healed else {})
    rows = []
    for name, model in models.items():
        measured = {key: (model.perplexity or {}).get(key) for key in ("perplexity", "byte_perplexity", "whole")}
        sizes = {"parameters": model.parameters, "body": model.body, "vocab_size": model.vocab_size}
        speed = run.speed() if name == PRUNED else None
        speeds = {key: getattr(speed, key) for key in _SPEEDS if speed}
        rows.append(ModelRow(None if name == DENSE else run.ratio, name, **sizes, **measured, **speeds))
    return rows


_SPEEDS = [f"{phase}_speedup{end}" for phase in ("prefill", "decode") for end in ("", "_low", "_high")]
