"""Configurations beside a run's: sweeps over a grid of settings, and the smallest model."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tailored_llama.config.execution import GgufType
from tailored_llama.config.inputs import BenchmarkConfig
from tailored_llama.config.loading import assign, read_config_data, validate_as
from tailored_llama.config.schema import RunConfig
from tailored_llama.config.section import Section
from tailored_llama.errors import InputError

RATIOS = "pruning.ratios"
SEED = "seed"
MODEL = "model"
MAY_VARY = (SEED, MODEL, "calibration", "pruning", "reconstruction", "prompts", "tuning")
READ_BY_DENSE = (SEED, MODEL, "prompts", "tuning")  # of what may vary, what a tuned dense model depends on

DENSE, TUNED_DENSE = "dense", "dense, tuned"  # rows of the dense model without and with adapters
RATIOS_TO_TRY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


class SweepConfig(RunConfig):
    """A run configuration, and the settings that differ between its cells."""

    grid: tuple[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], ...] = Field(min_length=1)
    """Tables of dotted field → list of values, such as "pruning.criterion" = ["taylor_gate", "random"]; each table
    gives one cell for every combination of its values. Each of pruning.ratios is a cell of its own; cells that differ
    only in seed share a row of the results."""
    labels: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Name of each table of the grid; absent: cells are named by the settings that differ."""
    scored: bool = Field(True, description="Score the benchmarks as well as the perplexity.")
    tailored: bool = Field(False, description="Tune the cells' models and score them beside the dense model.")

    @property
    def fields(self) -> list[str]:
        """All fields of the grid."""
        return list(dict.fromkeys(field for table in self.grid for field in table))

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        for field in self.fields:
            if field.split(".")[0] not in MAY_VARY:
                yield f"grid: got {field!r}; allowed: seed, and the fields of {', '.join(MAY_VARY[1:])}"
            if field == "tuning.dense":
                yield f"grid: got {field!r}; allowed: in the table [tuning], for the whole sweep"
            if not self.tailored and field.startswith("tuning."):
                yield f"grid: got {field!r}, which changes nothing without tuning; allowed: with tailored = true"
        if self.labels and len(self.labels) != len(self.grid):
            yield f"labels: got {len(self.labels)}; allowed: {len(self.grid)}, one for each table of the grid"
        sweep_cells(self)  # names what is wrong in a cell


@dataclass(frozen=True)
class SweepCell:
    """One cell of a sweep."""

    label: str  # of the settings that differ, seed and ratio excluded
    dense: str  # the row of its dense model
    run: RunConfig


SWEEP_FIELDS = set(SweepConfig.model_fields) - set(RunConfig.model_fields)


def sweep_cells(config: SweepConfig) -> list[SweepCell]:
    """All distinct cells of the grid, in its order; InputError: a value is out of bounds, in the cell that it names."""
    shared = config.model_dump(mode="json", exclude=SWEEP_FIELDS)
    varying = [field for field in config.fields if field not in (RATIOS, SEED)]
    cells: dict[str, SweepCell] = {}
    for table, name in zip(config.grid, config.labels or [""] * len(config.grid), strict=True):
        labelled = [field for field in table if len(table[field]) > 1 and field in varying] if name else varying
        for values in itertools.product(*table.values()):
            settings = dict(zip(table, values, strict=True))
            for run in _runs(shared, settings):
                cells.setdefault(run.model_dump_json(), _cell(config, name, labelled, run))
    return list(cells.values())


def _runs(shared: dict[str, Any], settings: dict[str, Any]) -> list[RunConfig]:
    """The runs with these settings, one for each ratio."""
    data = copy.deepcopy(shared)
    try:
        for field, value in settings.items():
            assign(data, field, [value] if field == RATIOS else value)
        run = validate_as(RunConfig, data)
    except InputError as error:
        raise InputError(f"grid, cell {settings}: {error}") from None
    each = [run.pruning.model_copy(update={"ratios": (ratio,)}) for ratio in run.pruning.ratios]
    return [run.model_copy(update={"pruning": pruning}) for pruning in each]


def dense_runs(config: SweepConfig, cells: Sequence[SweepCell]) -> dict[str, RunConfig]:
    """The sweep's own settings for each dense model, by the name of its row."""
    return {cell.dense: config.model_copy(update={MODEL: cell.run.model}) for cell in cells}


def tuned_dense_cells(config: SweepConfig, cells: Sequence[SweepCell]) -> list[SweepCell]:
    """The dense models, tuned on the same shots as the models of the cells; none without `tuning.dense`.

    There is one for each combination of model, prompts, tuning and seed among the tuned cells. Its ratio is 0.
    """
    if not config.tuning.dense:
        return []
    runs: dict[str, tuple[str, SweepConfig]] = {}
    for cell in cells:
        if config.tailored and cell.run.tuning.examples != "none":
            sections = {section: getattr(cell.run, section) for section in READ_BY_DENSE}
            run = config.model_copy(update=sections)
            runs.setdefault(run.model_dump_json(include=set(READ_BY_DENSE)), (cell.dense, run))
    read = [field for field in config.fields if field.split(".")[0] in ("prompts", "tuning")]
    varying = [field for field in read if len({str(attrgetter(field)(run)) for _, run in runs.values()}) > 1]
    found = []
    for dense, run in runs.values():
        name = dense.replace(DENSE, TUNED_DENSE, 1)
        texts = [_setting_text(run, field) for field in varying]
        found.append(SweepCell(", ".join([name, *texts]), dense, run))
    return found


def _cell(config: SweepConfig, name: str, varying: Sequence[str], run: RunConfig) -> SweepCell:
    models = [_setting_text(run, field) for field in config.fields if field.split(".")[0] == MODEL]
    dense = ", ".join([DENSE, *models])
    texts = [_setting_text(run, field) for field in varying]
    label = ", ".join([*([name] if name else []), *texts]) or "pruned"
    return SweepCell(label, dense, run)


def _setting_text(run: RunConfig, field: str) -> str:
    """A field's value in a run, with the field's name unless the value explains itself."""
    value = attrgetter(field)(run)
    return value if isinstance(value, str) and value != "none" else f"{field.split('.')[-1]}={value}"


class GoalConfig(Section):
    """What the smallest model must still do, and what small means."""

    lose_at_most: float = Field(3.0, gt=0, lt=100)
    """Points of accuracy that the model may lose on every benchmark, against the better of the dense model as it is and
    tuned."""
    confidence: float = Field(0.95, ge=0.5, lt=1)
    """Confidence of the proof that it loses less, over all openings of its rows."""
    smallest: Literal["file", "memory", "reading", "writing"] = "file"
    """What is to be small: the bytes of the file; the bytes in memory, with the keys and values of 4,096 tokens; the
    time to read a prompt; or the time to write a token. llama.cpp measures times on this machine."""
    runtime: Literal["llama.cpp", "transformers", "vllm"] = "llama.cpp"
    """What will run the model: llama.cpp gets a GGUF file in one of `types`, the others a checkpoint in 16 bits."""
    types: tuple[GgufType, ...] = Field(("iq4_nl", "q5_0", "q8_0"), min_length=1)
    """Types of GGUF file to choose from, for llama.cpp."""
    models: tuple[str, ...] = ()
    """Further base models to start from. The reference is model.source, as it is or tuned."""
    choosing_rows: int = Field(1000, ge=10)
    """Rows to choose candidates with, at most, with a label or without; none is tuned on, and none proves anything."""
    even_if_unprovable: bool = Field(False, description="Search even if there are too few rows to prove lose_at_most.")
    labels: str = Field("to-label.csv", pattern=r"\.(csv|jsonl)$")
    """With rows that have no label: the .csv or .jsonl file in which a search asks for labels, and finds them."""
    ask: bool = True
    """Ask for labels to choose with, and for those that may still prove a smaller model; false: make do with the labels
    that there are."""
    label_errors: float = Field(0.0, ge=0, lt=0.5)
    """The share of wrong labels to reckon with. If chance makes labels wrong, a loss looks smaller by up to twice that
    share of itself, so the margin that is tested is smaller by as much."""

    @property
    def tested_margin(self) -> float:
        """The margin that is tested, as a share."""
        return self.lose_at_most / 100 * (1 - 2 * self.label_errors)


class SmallestConfig(RunConfig):
    """A run configuration and a goal; `pruning.ratios` are those to choose from."""

    goal: GoalConfig = GoalConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_a_search(cls, data: Any) -> Any:
        """All ratios are tried, several benchmarks share one adapter, and the answer is exported."""
        if not isinstance(data, dict):
            return data
        defaults: dict[str, dict[str, Any]] = {"pruning": {"ratios": RATIOS_TO_TRY}, "store": {"export": "smallest"}}
        if isinstance(data.get("benchmarks"), list | tuple) and len(data["benchmarks"]) > 1:
            defaults["tuning"] = {"examples": "mixture"}
        for name, fields in defaults.items():
            given = data.get(name, {})
            data = data | {name: fields | given if isinstance(given, dict) else given}
        return data

    @field_validator("benchmarks", mode="after")
    @classmethod
    def _divided(cls, benchmarks: tuple[BenchmarkConfig, ...]) -> tuple[BenchmarkConfig, ...]:
        return tuple(own.model_copy(update={"is_divided": not own.data}) for own in benchmarks)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        goal, tuning = self.goal, self.tuning
        if len(self.benchmarks) > 1 and tuning.examples == "benchmark":
            got = f"'benchmark' with {len(self.benchmarks)} benchmarks"
            yield f"tuning.examples: got {got}; allowed: mixture or none, as one model has to do all of them"
        if goal.runtime != "llama.cpp" and goal.smallest in ("reading", "writing"):
            got = f"{goal.smallest!r} with runtime {goal.runtime!r}, which is not timed here"
            yield f"goal.smallest: got {got}; allowed: file or memory"
        if twice := {model for model in goal.models if model == self.model.source or goal.models.count(model) > 1}:
            yield f"goal.models: got {min(twice)!r} twice; allowed: each model once, beside model.source"
        if len(set(goal.types)) < len(goal.types):
            yield f"goal.types: got {', '.join(goal.types)}; allowed: each type once"
        unlabelled = [benchmark.name for benchmark in self.benchmarks if benchmark.unlabelled]
        if unlabelled and len(unlabelled) < len(self.benchmarks):
            yield f"benchmarks: {', '.join(unlabelled)} alone with unlabelled rows; allowed: all of them, or none"

    @property
    def file_types(self) -> tuple[GgufType | None, ...]:
        """The types of file to choose from; None is a checkpoint in 16 bits."""
        return self.goal.types if self.goal.runtime == "llama.cpp" else (None,)


def bases_of(config: SmallestConfig) -> list[SmallestConfig]:
    """The same search for each base model alone; the first has the reference."""
    further = [config.model.model_copy(update={"source": name, "revision": None}) for name in config.goal.models]
    alone = config.goal.model_copy(update={"models": ()})
    return [config.model_copy(update={"model": model, "goal": alone}) for model in (config.model, *further)]


def composition_of(path: str | Path, overrides: list[str] | None = None) -> str:
    """Tell what a configuration is for by fields that no other one has: sweep or smallest; else tailor."""
    kinds: dict[str, type[RunConfig]] = {"sweep": SweepConfig, "smallest": SmallestConfig}
    given = read_config_data(path, overrides).keys() - RunConfig.model_fields.keys()
    return next((name for name, kind in kinds.items() if given & kind.model_fields.keys()), "tailor")
