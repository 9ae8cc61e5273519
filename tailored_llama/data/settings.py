"""The settings of rendered prompts, beside the examples: which are rendered, and in what wording."""

from dataclasses import dataclass
from typing import Any, Self

from tailored_llama.config import BenchmarkConfig, RunConfig, is_written, stop_strings
from tailored_llama.data.splits import Split
from tailored_llama.data.templates import layout_of, load_template, names_in

_READ = ("name", "context", "choices", "form", "metric", "stop", "max_new_tokens")  # of a benchmark, for its chat


@dataclass(frozen=True)
class Draw:
    """How many examples of a train split are drawn by a seed, in this order: each is drawn from what is left."""

    num_fewshot: int = 0  # solved examples before each question
    shots: int | None = 0  # to tune on; None: as many as `tokens` allows
    held_out: int = 0
    tokens: int = 0  # of the shots, each read once
    seed: int = 0


@dataclass(frozen=True)
class Wording:
    """The wording of a benchmark in a template set; it is identified by its text, not by its file."""

    template: str  # the name of a shipped set, or the path of a file
    benchmark: BenchmarkConfig

    def identity(self) -> dict[str, Any]:
        """Return what prompts and their chat are made of besides the examples."""
        template = load_template(self.template)
        layout = layout_of(template, self.benchmark)
        shown = template.shown if "listed" in names_in(layout.layout) else None
        read = {field: getattr(self.benchmark, field) for field in _READ}
        return read | {"template": template.name, **layout.model_dump(), "shown": shown}


@dataclass(frozen=True)
class PromptSettings:
    """Which examples are rendered, and how."""

    wording: Wording
    split: Split  # train: shots and held_out
    draw: Draw = Draw()  # of the train split: rendered for train, shown as solved everywhere
    count: int | None = None  # of the examples of selection or evaluation; None: all

    @classmethod
    def of(cls, config: RunConfig, benchmark: BenchmarkConfig, split: Split, selection: int = 0) -> Self:
        """`selection` is the count of that split."""
        tuning, num_fewshot = config.tuning, config.scoring.num_fewshot
        wording = Wording(config.prompts.template, benchmark)
        if split == "evaluation":
            return cls(wording, split, Draw(num_fewshot, seed=config.seed if num_fewshot else 0), config.scoring.limit)
        if split == "selection":
            return cls(wording, split, Draw(num_fewshot, seed=config.seed), selection)
        shots, parts = config.shots_of(benchmark), len(config.benchmarks) if tuning.examples == "mixture" else 1
        tokens = tuning.tokens // (tuning.epochs * parts) if shots is None else 0
        draw = Draw(num_fewshot, shots, tuning.held_out, tokens, config.seed)
        return cls(wording, split, draw)

    @property
    def ending(self) -> str:
        """What ends an answer that the model is to learn to write."""
        benchmark = self.wording.benchmark
        return "".join(stop_strings(benchmark)[:1]) if self.split == "train" and is_written(benchmark) else ""
