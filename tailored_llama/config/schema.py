"""The run configuration: one TOML file, one frozen pydantic model, the same names everywhere."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tailored_llama.config.execution import ExecutionConfig, StoreConfig
from tailored_llama.config.forms import as_benchmark
from tailored_llama.config.inputs import (
    QUESTIONS,
    BenchmarkConfig,
    CalibrationConfig,
    ModelConfig,
    PromptConfig,
    TextConfig,
)
from tailored_llama.config.section import Section
from tailored_llama.config.training import FEW_SHOTS, TuningConfig
from tailored_llama.errors import InputError

Criterion = Literal["taylor_gate", "taylor_first", "magnitude_l2", "random"]
DATA_FREE: tuple[Criterion, ...] = ("magnitude_l2", "random")  # criteria that read no calibration text
Reconstruction = Literal["none", "static"]
Kind = Literal["attention", "mlp", "vocabulary"]
ROWS = 64  # the tokens of a trimmed vocabulary are a multiple of this


class PlanConfig(Section):
    """Which coupled groups leave."""

    criterion: Criterion = "taylor_gate"
    """How the importance of a coupled group is scored: by gradients (Taylor, with gates on whole groups or by element,
    as LLM-Pruner does), by the L2 norm of its weights, or at random."""
    kinds: tuple[Kind, ...] = Field(("attention", "mlp", "vocabulary"), min_length=1)
    """Kinds of coupled group that may be removed: attention (a KV head with its query heads), mlp (a channel),
    vocabulary (a token's row of the embedding and an untied head). Tokens leave first, other kinds for the rest."""
    vocabulary: Annotated[int, Field(ge=ROWS, multiple_of=ROWS)] | Literal["auto"] = "auto"
    """Kind vocabulary only: tokens kept, a multiple of 64; more stay if fewer would remove more than the ratio. auto:
    the number with which the pruned model loses least on the run's held-out train prompts. Which tokens stay is decided
    by how often the calibration text, the run's train prompts and general text use them."""
    min_channels: int = Field(64, ge=1, description="Minimum MLP channels kept in every layer.")
    min_kv_heads: int = Field(1, ge=1, description="Minimum KV heads kept in every layer, with their query heads.")
    channel_multiple: int = Field(1, ge=1)
    """MLP widths are multiples of this (64 or 128 suits matrix units), unless no channels leave."""


class PruningConfig(PlanConfig):
    """What is removed, and by which rule."""

    ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((0.2,), min_length=1)
    """Fractions of all parameters to remove, embeddings included; each gives one model."""

    def contradictions(self) -> Iterator[str]:
        if len(set(self.ratios)) < len(self.ratios):
            yield f"pruning.ratios: got {list(self.ratios)}; names a ratio twice; allowed: each ratio once"


class ReconstructionConfig(Section):
    """How the kept weights are fitted on the calibration text, to compensate for the removed ones."""

    method: Reconstruction = "static"
    """What ridge least squares fit. static: o_proj where heads leave and down_proj where channels do, to the dense
    layer's outputs, on the dense model's activations; none: nothing."""
    ridge: float = Field(0.1, gt=0, le=1)
    """Ridge pull to the dense weights, as a fraction of the mean squared activation."""


class ScoringConfig(Section):
    """How many examples are scored, and with how many shots."""

    limit: int | None = Field(None, ge=1, description="Examples of each evaluation split, evenly spaced; absent: all.")
    num_fewshot: int = Field(0, ge=0, le=64, description="Solved train examples put before each question.")


class PerplexityConfig(TextConfig):
    """The text that perplexity is measured on."""

    split: str = Field("validation", description="Benchmarks and Hub data sets: the split to read.")
    column: str = Field("passage", description="The column (or benchmark field) that holds the text.")
    window: int = Field(512, ge=16, le=32768, description="Tokens per window.")
    tokens: int | None = Field(8192, ge=16, description="Tokens read from the start of the text; absent: all of them.")


class RunConfig(Section):
    """Everything one run of the pipeline needs."""

    benchmarks: tuple[BenchmarkConfig, ...] = Field((BenchmarkConfig(name="arc_easy"),), min_length=1)
    """Names of benchmarks, files with one, or tables that define one."""
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of all random draws: calibration, shots, adapters, dropout.")
    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    pruning: PruningConfig = PruningConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    prompts: PromptConfig = PromptConfig()
    tuning: TuningConfig = TuningConfig()
    scoring: ScoringConfig = ScoringConfig()
    perplexity: PerplexityConfig = PerplexityConfig()
    execution: ExecutionConfig = ExecutionConfig()
    store: StoreConfig = StoreConfig()

    @model_validator(mode="before")
    @classmethod
    def _with_rows(cls, data: Any) -> Any:
        """Give the table `rows`, whose fields are those of a benchmark, to every benchmark that is one file."""
        if not isinstance(data, dict) or "rows" not in data:
            return data
        rows, others = data["rows"], {name: value for name, value in data.items() if name != "rows"}
        listed = others.get("benchmarks")
        tables = [as_benchmark(value) for value in listed] if isinstance(listed, (list, tuple)) else []
        files = [isinstance(table, dict) and table.get("data") is not None for table in tables]
        if not isinstance(rows, dict) or not any(files):
            raise InputError(f"rows: got {rows!r}; allowed: a table, beside a benchmark that is one file")
        given = [{**rows, **table} if file else table for table, file in zip(tables, files, strict=True)]
        return {**others, "benchmarks": given}

    def shots_of(self, benchmark: BenchmarkConfig) -> int | None:
        """The number of examples to tune on; None: as many as tuning.tokens allows."""
        auto = None if benchmark.data else FEW_SHOTS
        return auto if self.tuning.shots == "auto" else self.tuning.shots

    @property
    def tuned_on(self) -> str:
        """The examples to tune on, in words."""
        counts = {self.shots_of(benchmark) for benchmark in self.benchmarks}
        return f"at most {self.tuning.tokens:,} tokens of examples" if None in counts else f"{counts.pop()} examples"

    def contradictions(self) -> Iterator[str]:
        names = [benchmark.name for benchmark in self.benchmarks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield f"benchmarks: {', '.join(twice)} is named twice; allowed: each name once"
        if set(self.pruning.kinds) == {"vocabulary"}:
            yield "pruning.kinds: got vocabulary alone; allowed: with attention or mlp, for the rest of it"
        if not hasattr(self, "goal"):
            for benchmark in self.benchmarks:
                if benchmark.unlabelled:
                    got = f"benchmarks.{benchmark.name}.unlabelled: got {benchmark.unlabelled!r}"
                    yield f"{got}; allowed: in a search for the smallest model, which asks for labels"
        text, asked = self.calibration, len(self.benchmarks)
        if text.source == QUESTIONS and text.samples < asked:
            got = f"calibration.samples: got {text.samples}"
            yield f"{got}; allowed: at least {asked}, one for the questions of each benchmark"
