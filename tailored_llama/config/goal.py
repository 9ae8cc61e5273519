"""The goal of a search for the smallest model that still does a job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from tailored_llama.config.execution import GgufType
from tailored_llama.config.inputs import WRITTEN
from tailored_llama.config.schema import RunConfig
from tailored_llama.config.section import Section

RATIOS_TO_TRY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


class GoalConfig(Section):
    """What the smallest model must still do, and what small means."""

    lose_at_most: float = Field(3.0, gt=0, lt=100)
    """Points of accuracy (of mean probability, with measure probability) that the model may lose on every benchmark,
    against the better of the dense model as it is and tuned."""
    confidence: float = Field(0.95, ge=0.5, lt=1)
    """Confidence of the proof that it loses less, over all openings of its rows."""
    smallest: Literal["file", "memory", "reading", "writing"] = "file"
    """What is to be small: the bytes of the file; the bytes in memory, with the keys and values of 4,096 tokens; the
    time to read a prompt; or the time to write a token. Times are measured on this machine."""
    runtime: Literal["llama.cpp", "transformers", "vllm"] = "llama.cpp"
    """What will run the model: llama.cpp gets a GGUF file in one of `types`, the others a checkpoint in 16 bits."""
    types: tuple[GgufType, ...] = Field(("q4_0", "q5_0", "q8_0"), min_length=1)
    """Types of GGUF file to choose from, for llama.cpp."""
    models: tuple[str, ...] = Field((), description="Further base models to start from; the reference is model.source.")
    measure: Literal["accuracy", "probability"] = "accuracy"
    """What is compared: accuracy, or the mean probability that a model gives the right choice, which needs fewer rows
    for the same certainty. Answers that are written are always right or wrong."""
    choosing_rows: int = Field(1000, ge=10)
    """Rows to choose candidates with, at most; they are neither tuned on nor prove anything."""
    even_if_unprovable: bool = Field(False, description="Search even if there are too few rows to prove lose_at_most.")


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

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        goal, tuning = self.goal, self.tuning
        if goal.measure == "probability" and any(benchmark.metric in WRITTEN for benchmark in self.benchmarks):
            yield "goal.measure: got 'probability' with written answers; allowed: accuracy"
        if len(self.benchmarks) > 1 and tuning.examples == "benchmark":
            got = f"'benchmark' with {len(self.benchmarks)} benchmarks"
            yield f"tuning.examples: got {got}; allowed: mixture or none, as one model has to do all of them"
        if tuning.variant == "prompt":
            yield "tuning.variant: got 'prompt'; allowed: one that merges into weights"
        if goal.runtime == "vllm" and goal.smallest in ("reading", "writing"):
            got = f"{goal.smallest!r} with runtime 'vllm', which is not timed here"
            yield f"goal.smallest: got {got}; allowed: file or memory"
        if goal.runtime != "transformers" and self.pruning.shape == "any":
            yield f"pruning.shape: got 'any' with goal.runtime {goal.runtime!r}; allowed: stock"
        if twice := {model for model in goal.models if model == self.model.source or goal.models.count(model) > 1}:
            yield f"goal.models: got {min(twice)!r} twice; allowed: each model once, beside model.source"
        if len(set(goal.types)) < len(goal.types):
            yield f"goal.types: got {', '.join(goal.types)}; allowed: each type once"

    @property
    def file_types(self) -> tuple[GgufType | None, ...]:
        """The types of file to choose from; None is a checkpoint in 16 bits."""
        return self.goal.types if self.goal.runtime == "llama.cpp" else (None,)


def bases_of(config: SmallestConfig) -> list[SmallestConfig]:
    """The same search for each base model alone; the first has the reference."""
    further = [config.model.model_copy(update={"source": name, "revision": None}) for name in config.goal.models]
    alone = config.goal.model_copy(update={"models": ()})
    return [config.model_copy(update={"model": model, "goal": alone}) for model in (config.model, *further)]
