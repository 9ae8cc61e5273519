"""The run configuration: one TOML file, one frozen pydantic model, the same names everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Dtype = Literal["float32", "bfloat16", "float16"]
Criterion = Literal[
    "taylor_gate", "taylor_first", "taylor_vector", "taylor_second", "taylor_mixed", "wanda_sp", "flap",
    "magnitude_l1", "magnitude_l2", "random",
]  # fmt: skip
DATA_FREE: tuple[Criterion, ...] = ("magnitude_l1", "magnitude_l2", "random")  # criteria that read no calibration text
Reconstruction = Literal["none", "bias", "static", "sequential"]
Allocation = Literal["uniform", "global"]
Kind = Literal["attention", "mlp"]
Variant = Literal["lora", "rslora", "dora", "prompt", "prefix"]
SOFT: tuple[Variant, ...] = ("prompt", "prefix")  # variants that change no weights
Metric = Literal["acc", "acc_norm", "exact_match", "f1"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


class Section(BaseModel):
    """Base of every section: immutable, and a name that is not a field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Section):
    """The dense model that everything starts from."""

    source: str = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="An embedded model (smollm2-135m-instruct, from a pinned PyPI wheel), a local folder, a .gguf "
        "file, or a Hub id such as meta-llama/Llama-2-7b-hf.",
    )
    revision: str | None = Field(
        None, description="Hub models only: commit, tag or branch. A tag or branch is resolved to its commit."
    )
    dtype: Dtype = Field("float32", description="Type the weights are kept in, from loading to merging.")

    @property
    def short_name(self) -> str:
        """What runs are called by: the last part of the source."""
        return Path(self.source).name or self.source


class TextConfig(Section):
    """A text: calibration and perplexity are measured on one."""

    source: str = Field(
        "boolq",
        description="A benchmark's name (its texts, see column), a .txt, .parquet, .jsonl or .csv file, or a Hub "
        "data set such as Salesforce/wikitext.",
    )
    subset: str | None = Field(None, description="Hub data sets only: the configuration, e.g. wikitext-2-raw-v1.")
    revision: str | None = Field(None, description="Hub data sets only: commit, tag or branch.")
    split: str = Field("train", description="Benchmarks and Hub data sets: the split to read.")
    column: str = Field("text", description="The column (or benchmark field) that holds the text.")
    documents: int = Field(10_000, ge=1, description="Hub data sets only: rows read, from the start of the split.")


class CalibrationConfig(TextConfig):
    """The text that importance is measured on and reconstruction fitted to (LLM-Pruner: 10 samples of 64 tokens)."""

    source: str = Field(
        "boolq",
        description="A benchmark's name (its texts, see column), a .txt, .parquet, .jsonl or .csv file, a Hub data "
        "set such as Salesforce/wikitext, or `prompts`: the training prompts of the run's own benchmarks, with their "
        "answers.",
    )
    column: str = Field("passage", description="The column (or benchmark field) that holds the text.")
    samples: int = Field(32, ge=1, le=65536, description="Sequences drawn from the text.")
    tokens: int = Field(
        1024, ge=8, le=32768, description="Tokens in each sequence: few long ones serve better than many short ones."
    )


class PruningConfig(Section):
    """What is removed, and by which rule."""

    ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.2,),
        min_length=1,
        description="Fractions of ALL parameters to remove, embeddings counted; one model each.",
    )
    criterion: Criterion = Field(
        "taylor_gate",
        description="Importance of a coupled group: Taylor by gradient (of gates on the whole group; or first order "
        "by element or by vector, diagonal-Fisher second order, or both mixed), by activations (Wanda-sp, FLAP), "
        "weight magnitude (L1, L2), or random.",
    )
    allocation: Allocation = Field(
        "global",
        description="uniform: every unprotected layer loses the same share; global: groups of all layers and kinds "
        "ranked together by importance per parameter.",
    )
    attention_weight: float = Field(
        3.0,
        gt=0,
        description="In the global ranking, importance of attention groups is multiplied by this: above 1 keeps more "
        "heads, which other texts need more than the calibration text shows. FLAP's scores, which are standardised "
        "and below 0 too, are taken as they are.",
    )
    kinds: tuple[Kind, ...] = Field(
        ("attention", "mlp"), min_length=1, description="Kinds of coupled group that may be removed."
    )
    protect_first: int = Field(0, ge=0, description="Leading layers left whole.")
    protect_last: int = Field(0, ge=0, description="Trailing layers left whole.")
    min_channels: int = Field(64, ge=1, description="MLP channels that every layer keeps at least.")
    min_kv_heads: int = Field(1, ge=1, description="KV heads, with their query heads, that every layer keeps at least.")
    channel_multiple: int = Field(
        1,
        ge=1,
        description="Kept MLP channels of a layer are a multiple of this (64 or 128 suits matrix units); a layer that "
        "loses none keeps its width.",
    )
    steps: int = Field(
        1, ge=1, le=64, description="Equal parts the removal is cut into; importance is scored anew before each."
    )

    @field_validator("ratios")
    @classmethod
    def _distinct(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(ratios)) != len(ratios):
            raise ValueError("names a ratio twice; allowed: each ratio once")
        return ratios


class ReconstructionConfig(Section):
    """How the weights that stay make up for those that go; they are fitted on the calibration text."""

    method: Reconstruction = Field(
        "sequential",
        description="Which projections are fitted by ridge least squares, and to what: all, to the dense model's "
        "outputs and residual stream, on what the layers pruned before left of it (sequential); o_proj and down_proj, "
        "to the dense layer's outputs, on the dense model's own activations (static); a bias of both, to the mean of "
        "what was removed (bias: FLAP's compensation); or nothing (none).",
    )
    ridge: float = Field(
        0.1, gt=0, le=1, description="Pull towards the dense weights, as a share of the mean squared activation."
    )


class PromptConfig(Section):
    """How an example is written out, for tuning and for scoring alike."""

    template: str = Field(
        "harness",
        min_length=1,
        description="A template set: harness (lm-evaluation-harness's own formatting), generic (one wording for every "
        "benchmark), task, task-2, task-3 (an instruction for each benchmark, in three wordings), reread (task with "
        "the question read twice: RE2, arXiv 2309.06275), lettered (choices listed, their letters scored), or a .toml "
        "file of your own like those in data/prompts.",
    )


class TrainingConfig(Section):
    """An adapter and how it is trained (LoRA: arXiv 2106.09685)."""

    rank: int = Field(8, ge=1, le=1024, description="LoRA rank r: the width of each update.")
    alpha: int = Field(
        16, ge=1, le=4096, description="LoRA scale α; the update is multiplied by α / r (variant rslora: α / √r)."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout on the input of each adapter.")
    variant: Variant = Field(
        "lora",
        description="lora: updates scaled by α / r; rslora: by α / √r (arXiv 2312.03732); dora: directions and "
        "magnitudes of the weights apart (arXiv 2402.09353). In tuning also, with no change of weights: prompt, "
        "embeddings before the text (arXiv 2104.08691); prefix, keys and values of every layer (arXiv 2101.00190).",
    )
    targets: tuple[Projection, ...] = Field(PROJECTIONS, min_length=1, description="Projections that get an adapter.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Of matrix products over float32 weights; bfloat16 is about twice as fast where the machine has "
        "it. Adapters, their gradients and the optimiser stay in float32, weights in the checkpoint's own type.",
    )
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Learning rate after warm-up.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps spent warming up.")
    batch_size: int = Field(8, ge=1, description="Examples per optimiser step.")
    micro_batch_tokens: int = Field(
        2048,
        ge=64,
        description="Tokens in one forward pass of a step, halved when memory runs out; dropout is drawn anew for each "
        "pass.",
    )


class DistillationConfig(Section):
    """What the dense model teaches: its next-token distributions, cached once (arXiv 1503.02531)."""

    weight: float = Field(
        0.0,
        ge=0,
        le=100,
        description="In tuning, the weight of the divergence from the dense model on the examples and on text, beside "
        "the loss of the right choices; 0: the dense model is not asked. Healing has no other loss than this one.",
    )
    temperature: float = Field(
        1.0, gt=0, le=20, description="Logits are divided by it; above 1 unlikely tokens weigh more."
    )
    top: int = Field(
        32, ge=1, le=1024, description="Likeliest tokens kept of each distribution; all others are counted as one."
    )
    sequences: int = Field(
        2, ge=0, le=1024, description="In tuning, sequences of the calibration text beside the examples of each step."
    )


class HealingConfig(TrainingConfig):
    """General recovery before tailoring: LoRA by distillation on calibration text, merged into the pruned model."""

    tokens: int = Field(
        0,
        ge=0,
        le=20_000_000,
        description="Tokens of text trained on, drawn as the calibration text is, in whole sequences of its length; 0: "
        "no healing. What the dense model says along it takes about 400 bytes of memory a token.",
    )
    variant: Literal["lora", "rslora", "dora"] = Field("lora", description="As in tuning; it must merge.")
    rank: int = Field(64, ge=1, le=1024, description="LoRA rank r: the width of each update.")
    alpha: int = Field(64, ge=1, le=4096, description="LoRA scale α; the update is multiplied by α / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of each adapter.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Peak learning rate of AdamW.")
    batch_size: int = Field(
        1, ge=1, description="Text sequences per optimiser step: the fewer, the more steps a budget of tokens buys."
    )


class TuningConfig(TrainingConfig):
    """LoRA on a few examples of one benchmark (arXiv 2410.19185, section 4)."""

    examples: Literal["benchmark", "mixture", "none"] = Field(
        "benchmark",
        description="benchmark: an adapter for each, trained on its own examples; mixture: one adapter for all, on "
        "as many examples in total, drawn from all benchmarks and written with the template `generic`, whatever is "
        "scored with: what tailoring is compared with; none: no adapter.",
    )
    shots: int = Field(50, ge=1, description="Training examples, drawn from the train split by seed.")
    held_out: int = Field(50, ge=0, description="Further train examples, kept for early stopping; 0: no stopping.")
    ranking: float = Field(
        0.0,
        ge=0,
        le=100,
        description="Weight of a ranking loss: cross-entropy over an example's choices, by their log-likelihoods as "
        "the benchmark's metric compares them. 0: only the right choice is trained on.",
    )
    virtual_tokens: int = Field(20, ge=1, le=1024, description="Variants prompt and prefix: how many tokens they take.")
    epochs: int = Field(3, ge=1, le=1000, description="Passes over the training examples, at most.")
    patience: int = Field(2, ge=1, description="Epochs without a lower held-out loss before tuning stops.")


class ScoringConfig(Section):
    """What is scored."""

    limit: int | None = Field(
        None,
        ge=1,
        description="Examples of each evaluation split, evenly spaced over it; absent: all of them.",
    )
    num_fewshot: int = Field(0, ge=0, le=64, description="Solved train examples put before each question.")


class PerplexityConfig(TextConfig):
    """The text that perplexity is measured on."""

    split: str = Field("validation", description="Benchmarks and Hub data sets: the split to read.")
    column: str = Field("passage", description="The column (or benchmark field) that holds the text.")
    window: int = Field(512, ge=16, le=32768, description="Tokens per window.")
    stride: int | None = Field(
        None,
        ge=1,
        le=32768,
        description="Tokens from one window to the next, at most the window: what overlaps is context, and is not "
        "scored twice. Absent: the window, so that windows do not overlap, as in lm-evaluation-harness.",
    )
    tokens: int | None = Field(8192, ge=16, description="Tokens read from the start of the text; absent: all of them.")

    @field_validator("stride")
    @classmethod
    def _stride_within_window(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value > (window := info.data.get("window", value)):
            raise ValueError(f"allowed: at most {window}, the window")
        return value


class ProfileConfig(Section):
    """What is timed: each pruned model in turns with the dense one, on the machine that runs the stage."""

    batches: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        (1, 8), description="Prompts at a time, each number measured by itself; empty: nothing is timed."
    )
    prompt_tokens: int = Field(128, ge=1, le=32768, description="Tokens of a prompt.")
    new_tokens: int = Field(32, ge=2, le=4096, description="Tokens generated after it.")
    repeats: int = Field(5, ge=1, le=1000, description="Timed passes; the median counts.")


class BenchmarkConfig(Section):
    """A benchmark: one of the seven, or one of the user's own."""

    name: str = Field(
        description="boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge or openbookqa; or, with `train` and "
        "`evaluation` (or `source`) and the columns named, a new name.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
    )
    source: str | None = Field(None, description="A Hub data set to read instead of the embedded data.")
    subset: str | None = Field(None, description="Hub data sets only: the configuration, e.g. ARC-Easy.")
    revision: str | None = Field(None, description="Hub data sets only: commit, tag or branch.")
    train: str | None = Field(None, description="Train split: a .parquet, .jsonl or .csv file, or a Hub split's name.")
    evaluation: str | None = Field(None, description="Evaluation split: a file, or a Hub split's name.")
    context: str | None = Field(
        None,
        description="Own benchmarks: the column with the text before the answer, or a text with columns in it, such as "
        '"{passage}\\nQuestion: {question}\\nAnswer:".',
    )
    choices: str | tuple[str, ...] | None = Field(
        None, description="Own benchmarks: the column with the list of choices, or one column per choice."
    )
    answer: str | None = Field(
        None,
        description="Own benchmarks: the column with the answer: its index from 0, a letter (A, B, …), or its text. "
        "Where the model writes the answer: an accepted text, or a list of them.",
    )
    instruction: str | None = Field(None, description="Own benchmarks: the sentence that states the task.")
    metric: Metric | None = Field(
        None,
        description="Headline metric; absent: the benchmark's own, acc_norm for new ones. exact_match and f1 (SQuAD's) "
        "make a benchmark without choices, where the model writes the answer.",
    )
    max_new_tokens: int | None = Field(None, ge=1, le=4096, description="Written answers: tokens at most; absent: 32.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        None, min_length=1, description="Written answers end before the first of these; absent: at the line's end."
    )


class ExecutionConfig(Section):
    """How the work is done. Nothing here changes what is computed, so nothing here enters a cache key."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    batch_tokens: int | None = Field(
        None,
        ge=64,
        description="Tokens in a scoring pass, halved when memory runs out; absent: 1,024 on a CPU, 16,384 on a GPU. "
        "Importance and reconstruction take at most so many of the calibration text at a time; absent: 4,096.",
    )
    recompute_activations: bool = Field(
        False,
        description="Tuning keeps the hidden states between layers only, and computes what is within them again: about "
        "a third slower, in far less memory.",
    )
    keep_state_every: int = Field(
        100,
        ge=0,
        description="Steps of tuning or healing between two states that are kept, so that one that was killed goes on "
        "from there and ends with the same weights; 0: none is kept.",
    )
    exclusive: Literal["gpu", "always", "never"] = Field(
        "gpu",
        description="Which stages have their device to themselves, among all runs of this machine with the same "
        "store.downloads: those on a GPU, also those on the CPU, or none.",
    )
    dispatch: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Flow `tailor` only: stages that compute on the device run by deployments of this name (gpu: "
        "importance/gpu, prune/gpu, tune/gpu, …), on whatever worker takes them; absent: in the flow's own process.",
    )


class StoreConfig(Section):
    """Where artifacts and downloads are kept."""

    root: str = Field("artifacts", min_length=1, description="Folder, or fsspec URL, of the artifact store.")
    downloads: str = Field("~/.cache/tailored-llama", min_length=1, description="Folder of the fetched wheels.")
    export: str | None = Field(
        None,
        min_length=1,
        description="Folder that gets, for every benchmark and ratio, the finished model as one checkpoint with its "
        "card, such as arc_easy-0.2 (a copy of an artifact: it takes its room twice). Absent: none is made.",
    )


def _as_benchmark(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class RunConfig(Section):
    """Everything one run of the pipeline needs."""

    benchmarks: tuple[BenchmarkConfig, ...] = Field(
        (BenchmarkConfig(name="arc_easy"),),
        min_length=1,
        description="Names of benchmarks, or tables that define one.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every draw: calibration, shots, adapters, dropout.")
    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    pruning: PruningConfig = PruningConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    distillation: DistillationConfig = DistillationConfig()
    healing: HealingConfig = HealingConfig()
    prompts: PromptConfig = PromptConfig()
    tuning: TuningConfig = TuningConfig()
    scoring: ScoringConfig = ScoringConfig()
    perplexity: PerplexityConfig = PerplexityConfig()
    profile: ProfileConfig = ProfileConfig()
    execution: ExecutionConfig = ExecutionConfig()
    store: StoreConfig = StoreConfig()

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _names_are_benchmarks(cls, value: Any) -> Any:
        return [_as_benchmark(v) for v in value] if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _benchmarks_once(self) -> RunConfig:
        names = [b.name for b in self.benchmarks]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"benchmarks: {', '.join(twice)} is named twice; allowed: each name once")
        return self


def reserved_tokens(tuning: TuningConfig) -> int:
    """Tokens of the model's context that a soft prompt takes."""
    return tuning.virtual_tokens if tuning.variant in SOFT else 0


def read_fields(tuning: TuningConfig) -> dict[str, Any]:
    """What an adapter's bytes depend on, but for how many examples there are: the part of a cache key."""
    unread = {"shots", "held_out", "examples"}
    unread |= {"rank", "alpha", "dropout", "targets"} if tuning.variant in SOFT else {"virtual_tokens"}
    if not tuning.held_out:
        unread.add("patience")
    return tuning.model_dump(mode="json", exclude=unread)


def reads_calibration(run: RunConfig) -> bool:
    """Whether importance or reconstruction needs the calibration text."""
    return run.pruning.criterion not in DATA_FREE or run.reconstruction.method != "none"
