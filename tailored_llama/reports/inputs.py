"""The inputs of a run's report: the rows of each ratio, and the folders and manifests behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tailored_llama import evaluation
from tailored_llama.config import DENSE, TUNED_DENSE, RunConfig
from tailored_llama.evaluation import MEAN, PRUNED, TAILORED, ModelRow, RecoveryRow
from tailored_llama.models import read_structure
from tailored_llama.store import Manifest
from tailored_llama.training import Comparison, read_comparison


@dataclass(frozen=True)
class RunResults:
    """The results at one ratio: rows by model and benchmark, and the size and perplexity of each model.

    `adapters` are by what they were trained on: a benchmark, or `mixture`. `beside_tuned` is the tailored model beside
    the dense model tuned on the same shots.
    """

    ratio: float | None
    rows: tuple[RecoveryRow, ...]
    models: Mapping[str, ModelRow]
    adapters: Mapping[str, Path] = field(default_factory=dict)
    beside_tuned: RecoveryRow | None = None

    @property
    def name(self) -> str:
        """Its name in a report of several."""
        return "pruned" if self.ratio is None else f"ratio {self.ratio:g}"

    @property
    def benchmarks(self) -> list[str]:
        """The scored benchmarks in order, without the mean."""
        return [name for name in dict.fromkeys(row.benchmark for row in self.rows) if name != MEAN]

    @property
    def lines(self) -> list[str]:
        """The benchmarks, followed by the mean if there are several."""
        return self.benchmarks + [MEAN] * (len(self.benchmarks) > 1)

    def row(self, model: str, benchmark: str) -> RecoveryRow | None:
        return next((row for row in self.rows if (row.model, row.benchmark) == (model, benchmark)), None)

    def any_row(self, benchmark: str) -> RecoveryRow:
        """A row on a benchmark, for the fields that all models share: metric, examples and floor."""
        return next(row for row in self.rows if row.benchmark == benchmark)

    def overall(self, model: str) -> RecoveryRow | None:
        """A model's row on the only benchmark, or its mean."""
        return self.row(model, self.lines[-1])

    def size(self, model: str) -> ModelRow:
        """A model's size and perplexity, as far as they are known."""
        return self.models.get(model, ModelRow(self.ratio, model))

    def comparison(self, benchmark: str) -> Comparison | None:
        """The adapter of a benchmark against none, on held-out examples; that of a mixture is the same for all."""
        adapter = self.adapters.get(benchmark) or self.adapters.get("mixture")
        return read_comparison(adapter) if adapter else None


@dataclass(frozen=True)
class ReportInputs:
    """All inputs of a report; what is missing is left out.

    `perplexity` has the metrics of the dense model, `prompts` the folders of rendered prompts. `costs` are the
    manifests of the artifacts, each after its label. `failed` are the errors of stages without an artifact, by name.
    """

    runs: Sequence[RunResults]
    config: RunConfig
    perplexity: Mapping[str, float] = field(default_factory=dict)
    prompts: Mapping[str, Path] = field(default_factory=dict)
    costs: Sequence[tuple[str, Manifest]] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


def run_results(
    dense: evaluation.MeasuredModel[Path],
    run: evaluation.TailoredRun[Path] | None,
    tuned_dense: Mapping[str, Path],
    seed: int,
) -> RunResults:
    """The results at the ratio of a run or, without one, of the dense model alone.

    `tuned_dense` are the scores of the dense model tuned on the same shots, if that was asked.

    Raises:
        InputError: as `results_at`.
    """
    folders, rows = {DENSE: dense.scores, TUNED_DENSE: tuned_dense}, [_model_row(None, DENSE, dense)]
    in_files = {f"{DENSE} {kind}": scores for kind, scores in dense.quantised.items()}
    if run is None:
        return results_at(None, folders | in_files, rows, seed)
    rows.append(_model_row(run.ratio, PRUNED, run.pruned))
    folders[PRUNED] = run.pruned.scores
    in_files |= {f"{TAILORED} {kind}": scores for kind, scores in run.quantised.items()}
    both = {name: folder for name, folder in run.tailored.items() if name in tuned_dense}
    beside = results_at(None, {DENSE: tuned_dense, TAILORED: both}, (), seed).rows
    results = results_at(run.ratio, folders | {TAILORED: run.tailored} | in_files, rows, seed)
    return replace(results, adapters=run.adapters, beside_tuned=beside[-1] if beside else None)


def results_at(
    ratio: float | None, folders: Mapping[str, Mapping[str, Path]], models: Sequence[ModelRow], seed: int = 0
) -> RunResults:
    """The results at a ratio from the score folders of each model and benchmark, and the sizes of models.

    Raises:
        InputError: scores of a benchmark have different examples or metrics, or a file is missing or broken.
    """
    scores = {
        model: {name: evaluation.read_score(path) for name, path in named.items()} for model, named in folders.items()
    }
    sizes = {row.model: row for row in (ModelRow(None, DENSE), ModelRow(ratio, PRUNED), *models)}
    return RunResults(ratio, tuple(evaluation.recovery_rows(scores, ratio, seed)), sizes)


def _model_row(ratio: float | None, name: str, model: evaluation.MeasuredModel[Path]) -> ModelRow:
    measured = evaluation.read_metrics(model.perplexity) if model.perplexity else {}
    perplexities = {key: measured.get(key) for key in ("perplexity", "byte_perplexity", "whole")}
    return ModelRow(ratio, name, **asdict(read_structure(model.checkpoint).size), **perplexities)
