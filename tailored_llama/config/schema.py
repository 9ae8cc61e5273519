"""The run configuration: one TOML file, one frozen pydantic model, the same names everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from tailored_llama.config.harness import find_task, is_harness_task, task_fields
from tailored_llama.errors import InputError

Dtype = Literal["float32", "bfloat16", "float16"]
Criterion = Literal[
    "taylor_gate", "taylor_first", "taylor_vector", "taylor_second", "taylor_mixed", "wanda_sp", "flap",
    "magnitude_l1", "magnitude_l2", "random",
]  # fmt: skip
PROMPTS = "prompts"  # calibration source: the training prompts of the run's own benchmarks
DATA_FREE: tuple[Criterion, ...] = ("magnitude_l1", "magnitude_l2", "random")  # criteria that read no calibration text
Reconstruction = Literal["none", "bias", "static", "sequential"]
Allocation = Literal["uniform", "global", "search"]
Kind = Literal["attention", "mlp", "vocabulary"]
ROWS = 64  # the tokens of a trimmed vocabulary are a multiple of this
GgufType = Literal[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
]  # fmt: skip
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
K_QUANTS = GGUF_TYPES[GGUF_TYPES.index("q2_k") :]  # made by llama.cpp itself
Variant = Literal["lora", "rslora", "dora", "prompt", "prefix"]
SOFT: tuple[Variant, ...] = ("prompt", "prefix")  # variants that change no weights
Quantization = Literal["none", "nf4"]
NF4_MULTIPLE = 64  # weights in a block; on a CPU, rows of nf4 matrices must be whole blocks
Metric = Literal["acc", "acc_norm", "exact_match", "f1"]
Ignored = Literal["case", "punctuation", "numbers", "spaces"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


class Section(BaseModel):
    """Base of every section: immutable, and unknown fields are errors."""

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
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32",
        description="Data type of the weights, from loading to merging. auto: bfloat16 where this machine computes in "
        "it natively, which is about twice as fast; otherwise float32.",
    )
    quantization: Quantization = Field(
        "none",
        description="Type of the frozen weights while tuning and healing train an adapter on them. nf4: 4 bits by "
        "bitsandbytes (QLoRA, arXiv 2305.14314; extra nf4). The adapter is merged into the weights of type `dtype`, "
        "and all else is computed with those. On a CPU widths must be multiples of 64: see "
        "pruning.channel_multiple.",
        exclude_if=lambda value: value == "none",  # so that keys and cards of earlier configurations stay the same
    )

    @property
    def short_name(self) -> str:
        """The model's name in run names: the last part of the source."""
        return Path(self.source).name or self.source


class TextConfig(Section):
    """A text to read, for calibration or perplexity."""

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
    """The calibration text of importance and reconstruction (LLM-Pruner: 10 samples of 64 tokens)."""

    source: str = Field(
        "boolq",
        description="A benchmark's name (its texts, see column), a .txt, .parquet, .jsonl or .csv file, a Hub data "
        "set such as Salesforce/wikitext, or `prompts`: the training prompts of the run's own benchmarks, with their "
        "answers.",
    )
    column: str = Field("passage", description="The column (or benchmark field) that holds the text.")
    samples: int = Field(32, ge=1, le=65536, description="Sequences drawn from the text.")
    tokens: int = Field(
        1024, ge=8, le=32768, description="Tokens in each sequence. A few long ones work better than many short ones."
    )


class PruningConfig(Section):
    """What is removed, and by which rule."""

    ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.2,),
        min_length=1,
        description="Fractions of all parameters to remove, embeddings included; each gives one model.",
    )
    criterion: Criterion = Field(
        "taylor_gate",
        description="How the importance of a coupled group is scored: by gradients (Taylor with gates on whole groups; "
        "first order by element or by vector; diagonal-Fisher second order; or both orders mixed), by activations "
        "(Wanda-sp, FLAP), by weight magnitude (L1, L2), or at random.",
    )
    allocation: Allocation = Field(
        "global",
        description="uniform: every unprotected layer loses the same share; global: groups of all layers and kinds "
        "are ranked together by importance per parameter; search: widths are chosen by the divergence from the dense "
        "model that they cause, on calibration text and on the run's train prompts.",
    )
    search_evaluations: int = Field(
        300,
        ge=0,
        le=100_000,
        description="Allocation search only: models evaluated after each layer's attention and MLP have been measured "
        "alone; 0: their sum decides.",
        exclude_if=lambda value: value == 300,  # so that keys and cards of earlier configurations stay the same
    )
    attention_weight: float = Field(
        3.0,
        gt=0,
        description="Factor on the importance of attention groups in the global ranking. Above 1, more heads are kept: "
        "other texts need them more than the calibration text shows. FLAP's scores are not multiplied, because they "
        "are standardised and can be negative.",
    )
    kinds: tuple[Kind, ...] = Field(
        ("attention", "mlp"),
        min_length=1,
        description="Kinds of coupled group that may be removed: attention (a KV head with its query heads), mlp (a "
        "channel), vocabulary (a token's row of the embedding and of an untied head). Tokens leave first, and the "
        "other kinds supply the rest of the ratio.",
    )
    vocabulary: int | Literal["auto"] = Field(
        "auto",
        description="Kind vocabulary only: tokens kept, a multiple of 64; more if the ratio is reached without. auto: "
        "as many as vocabulary_share needs. What counts is how often the calibration text and the run's train prompts "
        "use a token.",
    )
    vocabulary_share: float = Field(
        0.995,
        gt=0,
        le=1,
        description="With vocabulary = auto: the share of the tokens of that text and those prompts that stay whole.",
    )
    protect_first: int = Field(0, ge=0, description="Leading layers that are not pruned.")
    protect_last: int = Field(0, ge=0, description="Trailing layers that are not pruned.")
    min_channels: int = Field(64, ge=1, description="Minimum MLP channels kept in every layer.")
    min_kv_heads: int = Field(1, ge=1, description="Minimum KV heads kept in every layer, with their query heads.")
    channel_multiple: int = Field(
        1,
        ge=1,
        description="MLP widths of pruned layers are multiples of this (64 or 128 suits matrix units). A layer that "
        "loses no channels keeps its width.",
    )
    steps: int = Field(
        1, ge=1, le=64, description="Number of equal pruning steps; importance is scored again before each."
    )

    @field_validator("vocabulary", mode="before")
    @classmethod
    def _whole_rows(cls, value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < ROWS or value % ROWS):
            raise ValueError(f"allowed: a multiple of {ROWS}, or 'auto'")
        return value

    @field_validator("ratios")
    @classmethod
    def _distinct(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(ratios)) != len(ratios):
            raise ValueError("names a ratio twice; allowed: each ratio once")
        return ratios


class ReconstructionConfig(Section):
    """How the kept weights are fitted on the calibration text, to compensate for the removed ones."""

    method: Reconstruction = Field(
        "sequential",
        description="What is fitted by ridge least squares. sequential: all projections, to the dense model's outputs "
        "and residual stream, on activations from the layers already pruned; static: o_proj and down_proj, to the "
        "dense layer's outputs, on the dense model's activations; bias: a bias of both, to the mean of what was "
        "removed (FLAP's compensation); none: nothing.",
    )
    ridge: float = Field(
        0.1, gt=0, le=1, description="Ridge pull to the dense weights, as a fraction of the mean squared activation."
    )


class PromptConfig(Section):
    """How examples are written as prompts, for both tuning and scoring."""

    template: str = Field(
        "harness",
        min_length=1,
        description="A template set: harness (lm-evaluation-harness's own formatting), generic (one wording for every "
        "benchmark), task, task-2, task-3 (an instruction for each benchmark, in three wordings), reread (task with "
        "the question read twice: RE2, arXiv 2309.06275), lettered (choices listed, their letters scored), or your own "
        ".toml file, like those in data/prompts.",
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
        description="lora: updates scaled by α / r; rslora: by α / √r (arXiv 2312.03732); dora: weights split into "
        "direction and magnitude (arXiv 2402.09353). In tuning also soft prompts, which change no weights: prompt, "
        "embeddings before the text (arXiv 2104.08691); prefix, keys and values of every layer (arXiv 2101.00190).",
    )
    targets: tuple[Projection, ...] = Field(PROJECTIONS, min_length=1, description="Projections that get an adapter.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of matrix products over float32 weights; bfloat16 is about twice as fast where the "
        "hardware has it. Adapters, gradients and the optimiser stay in float32, weights in the checkpoint's type.",
    )
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Learning-rate schedule after warm-up.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Fraction of the steps used for warm-up.")
    batch_size: int = Field(8, ge=1, description="Examples per optimiser step.")
    micro_batch_tokens: int = Field(
        2048,
        ge=64,
        description="Tokens in one forward pass of a step, halved when memory runs out. Each pass draws its own "
        "dropout.",
    )


class DistillationConfig(Section):
    """Distillation from the dense model's next-token distributions, cached once (arXiv 1503.02531)."""

    weight: float = Field(
        0.0,
        ge=0,
        le=100,
        description="In tuning, weight of the divergence from the dense model on the examples and on text, added to "
        "the loss on the right choices; 0: no distillation. In healing, the divergence is the only loss.",
    )
    temperature: float = Field(
        1.0, gt=0, le=20, description="Logits are divided by this; above 1, unlikely tokens weigh more."
    )
    top: int = Field(
        32, ge=1, le=1024, description="Most likely tokens kept of each distribution; the rest count as one."
    )
    sequences: int = Field(
        2, ge=0, le=1024, description="In tuning, sequences of calibration text added to the examples of each step."
    )
    unlabelled: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Further train prompts of each benchmark (in a mixture: of all together) that tuning reads in the "
        "same epochs, without their labels: the loss of each is the divergence from the dense model's distribution "
        "over the choices, at the temperature. It needs no weight. They take about 80 bytes of memory per token.",
        exclude_if=lambda value: value == 0,  # so that keys and cards of earlier configurations stay the same
    )


class HealingConfig(TrainingConfig):
    """General recovery before tailoring: LoRA distilled on calibration text and merged into the pruned model."""

    tokens: int = Field(
        0,
        ge=0,
        le=20_000_000,
        description="Tokens to train on, drawn like the calibration text in whole sequences of its length; 0: no "
        "healing. The teacher outputs take about 400 bytes of memory per token.",
    )
    variant: Literal["lora", "rslora", "dora"] = Field("lora", description="As in tuning; it must merge into weights.")
    rank: int = Field(64, ge=1, le=1024, description="LoRA rank r: the width of each update.")
    alpha: int = Field(64, ge=1, le=4096, description="LoRA scale α; the update is multiplied by α / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of each adapter.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Peak learning rate of AdamW.")
    batch_size: int = Field(
        1, ge=1, description="Text sequences per optimiser step; fewer give more steps for the same tokens."
    )


class TuningConfig(TrainingConfig):
    """LoRA on a few examples of one benchmark (arXiv 2410.19185, section 4)."""

    examples: Literal["benchmark", "mixture", "none"] = Field(
        "benchmark",
        description="benchmark: one adapter per benchmark, trained on its own examples; mixture: the baseline for "
        "tailoring, one adapter trained on as many examples in total, drawn from all benchmarks and always written "
        "with the template `generic`; none: no adapter.",
    )
    shots: int = Field(50, ge=1, description="Training examples, drawn from the train split by seed.")
    held_out: int = Field(
        50,
        ge=0,
        description="Further train examples, for early stopping and to compare the adapter with none; 0: neither.",
    )
    ranking: float = Field(
        0.0,
        ge=0,
        le=100,
        description="Weight of a ranking loss: cross-entropy over the log-likelihoods of an example's choices, "
        "normalised as the benchmark's metric does. 0: only the right choice is trained on.",
    )
    virtual_tokens: int = Field(20, ge=1, le=1024, description="Variants prompt and prefix: number of virtual tokens.")
    epochs: int = Field(3, ge=1, le=1000, description="Maximum passes over the training examples.")
    patience: int = Field(2, ge=1, description="Epochs without a lower held-out loss before tuning stops.")
    keep: Literal["better", "always"] = Field(
        "better",
        description="Whether a finished model (store.export) gets its adapter. better: if the adapter is better than "
        "none on the held-out examples, within their error; otherwise the untuned model is exported. always: in any "
        "case. Scores of the tailored model are reported either way.",
        exclude_if=lambda value: value == "better",  # so that reports and cards of earlier configurations stay the same
    )


class ScoringConfig(Section):
    """How many examples are scored, and with how many shots."""

    limit: int | None = Field(
        None, ge=1, description="Examples of each evaluation split, evenly spaced over it; absent: all of them."
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
        description="Tokens from the start of one window to the next, at most the window. Overlapping tokens serve as "
        "context and are not scored again. Absent: the window, so no overlap, as in lm-evaluation-harness.",
    )
    tokens: int | None = Field(8192, ge=16, description="Tokens read from the start of the text; absent: all of them.")

    @field_validator("stride")
    @classmethod
    def _stride_within_window(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value > (window := info.data.get("window", value)):
            raise ValueError(f"allowed: at most {window}, the window")
        return value


class ProfileConfig(Section):
    """What is timed: each pruned model, alternating with the dense one, on the machine that runs the stage."""

    batches: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        (1, 8), description="Batch sizes in prompts, each measured separately; empty: no timing."
    )
    prompt_tokens: int = Field(128, ge=1, le=32768, description="Tokens in each prompt.")
    new_tokens: int = Field(32, ge=2, le=4096, description="Tokens generated after each prompt.")
    repeats: int = Field(5, ge=1, le=1000, description="Timed passes; the median is reported.")


class BenchmarkConfig(Section):
    """A benchmark: one of the seven, a task of lm-evaluation-harness, or one of the user's own."""

    name: str = Field(
        description="boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa or csqa; or a new name, "
        "with `train` and `evaluation` (or `source`) and the columns set; or lm_eval:sciq, a task of "
        "lm-evaluation-harness.",
        pattern=r"^(lm_eval:)?[A-Za-z0-9][A-Za-z0-9_.-]{0,95}$",
    )
    source: str | None = Field(
        None,
        description="A Hub data set to read instead of the embedded data. Tasks of lm-evaluation-harness: a folder "
        "with task files of your own.",
    )
    subset: str | None = Field(None, description="Hub data sets only: the configuration, e.g. ARC-Easy.")
    revision: str | None = Field(None, description="Hub data sets only: commit, tag or branch.")
    train: str | None = Field(None, description="Train split: a .parquet, .jsonl or .csv file, or a Hub split's name.")
    evaluation: str | None = Field(None, description="Evaluation split: a file, or a Hub split's name.")
    context: str | None = Field(
        None,
        description="Own benchmarks: the column with the text before the answer, or a format string of columns, such "
        'as "{passage}\\nQuestion: {question}\\nAnswer:".',
    )
    choices: str | tuple[str, ...] | None = Field(
        None, description="Own benchmarks: the column with the list of choices, or one column per choice."
    )
    answer: str | None = Field(
        None,
        description="Own benchmarks: the column with the answer: its index from 0, a letter (A, B, …), or its text. "
        "Written answers: an accepted text, or a list of them.",
    )
    instruction: str | None = Field(None, description="Own benchmarks: the sentence that states the task.")
    metric: Metric | None = Field(
        None,
        description="Headline metric; absent: the benchmark's own, acc_norm for new ones. exact_match and f1 (SQuAD's) "
        "are for benchmarks without choices, where the model writes the answer.",
    )
    max_new_tokens: int | None = Field(None, ge=1, le=4096, description="Written answers: maximum tokens; absent: 32.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        None, min_length=1, description="Strings that end a written answer; absent: the end of the line."
    )
    ignore: tuple[Ignored, ...] | None = Field(
        None,
        description="Written answers: what exact_match ignores, of case, punctuation, numbers and spaces around the "
        "answer; absent: case, punctuation, articles and repeated spaces (SQuAD's).",
    )

    @model_validator(mode="before")
    @classmethod
    def _as_its_task_says(cls, data: Any) -> Any:
        """Fill in what a task of lm-evaluation-harness decides, so that nobody else needs to look into its file."""
        if not isinstance(data, dict) or not is_harness_task(data.get("name")):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        written = given.get("metric") not in ("acc", "acc_norm")
        decided = ("stop", "max_new_tokens", "ignore") if written else ()
        if all(key in given for key in ("metric", *decided)):
            return data
        source = given.get("source")
        task = find_task(given["name"], source if isinstance(source, str) else None)
        return task_fields(task, given.get("metric")) | given


class ExecutionConfig(Section):
    """How the work is executed. Nothing here changes what is computed, so nothing here enters a cache key."""

    device: str = Field(
        "auto",
        description="auto, cpu, cuda (each stage takes the first GPU of its machine that is free) or cuda:N.",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
    )
    batch_tokens: int | None = Field(
        None,
        ge=64,
        description="Tokens in a scoring pass, halved when memory runs out; absent: 1,024 on a CPU, 16,384 on a GPU. "
        "Importance and reconstruction read at most this many calibration tokens at a time; absent: 4,096.",
    )
    streaming: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Which models are read from their checkpoint one layer at a time, instead of loaded whole: "
        "importance, reconstruction, perplexity, teacher outputs and scoring of choices can do that, with the same "
        "results. auto: those whose weights do not fit into the free memory of the device; always; never.",
    )
    recompute_activations: bool = Field(
        False,
        description="Tuning keeps only the hidden states between layers and recomputes the activations within them: "
        "about a third slower, with far less memory.",
    )
    keep_state_every: int = Field(
        100,
        ge=0,
        description="Steps of tuning or healing between saved states. A killed stage resumes from the last one and "
        "ends with the same weights. 0: no states are saved.",
    )
    exclusive: Literal["gpu", "always", "never"] = Field(
        "gpu",
        description="Which stages have exclusive use of their device, among all runs on this machine with the same "
        "store.downloads. gpu: stages on a GPU; always: also stages on the CPU; never: none.",
    )
    dispatch: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Flows `tailor`, `sweep` and `transfer`: stages that use the device run through the deployment "
        "`stage` of this name, such as gpu, side by side on all workers of its pool; absent: one after another in the "
        "flow's own process.",
    )


class StoreConfig(Section):
    """Where artifacts and downloads are kept."""

    root: str = Field("artifacts", min_length=1, description="Folder, or fsspec URL, of the artifact store.")
    downloads: str = Field("~/.cache/tailored-llama", min_length=1, description="Folder for downloaded wheels.")
    reports: str | None = Field(
        "reports",
        min_length=1,
        description="Folder that gets a copy of the newest report of each configuration file, such as "
        "reports/quickstart, when a flow runs on the command line; absent: none.",
    )
    export: str | None = Field(
        None,
        min_length=1,
        description="Folder that receives, for every benchmark and ratio, the finished model as one checkpoint with "
        "its card, such as arc_easy-0.2. It is a copy of an artifact and takes its space again. Absent: no export.",
    )
    export_formats: tuple[str, ...] = Field(
        ("safetensors",),
        min_length=1,
        description="What the export folder receives of every finished model: safetensors, the checkpoint; gguf:q8_0 "
        "(or another type, see `tailored-llama gguf --help`), a folder such as arc_easy-0.2-q8_0-gguf for llama.cpp. "
        "The dense and the tailored models are scored in these types, too.",
    )

    @field_validator("export_formats")
    @classmethod
    def _known_formats(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        allowed = ["safetensors", *(f"gguf:{name}" for name in GGUF_TYPES)]
        if unknown := [name for name in formats if name not in allowed]:
            raise ValueError(f"got {unknown[0]!r}; allowed: {', '.join(allowed)}")
        if len(set(formats)) != len(formats):
            raise ValueError("names a format twice; allowed: each format once")
        return formats


def as_gguf_type(name: str) -> GgufType:
    """The GGUF type of a name.

    Raises:
        InputError: there is none.
    """
    for known in GGUF_TYPES:
        if known == name:
            return known
    raise InputError(f"type: got {name!r}; allowed: {', '.join(GGUF_TYPES)}")


def _as_benchmark(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class RunConfig(Section):
    """Everything one run of the pipeline needs."""

    benchmarks: tuple[BenchmarkConfig, ...] = Field(
        (BenchmarkConfig(name="arc_easy"),), min_length=1, description="Names of benchmarks, or tables that define one."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of all random draws: calibration, shots, adapters, dropout.")
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
    def _tokens_leave_beside_others(self) -> RunConfig:
        kinds, steps = self.pruning.kinds, self.pruning.steps
        if "vocabulary" in kinds and len(set(kinds)) == 1:
            raise ValueError("pruning.kinds: got vocabulary alone; allowed: with attention or mlp, for the rest of it")
        if "vocabulary" in kinds and steps > 1:
            raise ValueError(f"pruning.steps: got {steps}; allowed: 1 with kind vocabulary")
        if self.pruning.allocation == "search" and steps > 1:
            raise ValueError(f"pruning.steps: got {steps}; allowed: 1 with allocation search")
        return self

    @model_validator(mode="after")
    def _benchmarks_once(self) -> RunConfig:
        names = [b.name for b in self.benchmarks]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"benchmarks: {', '.join(twice)} is named twice; allowed: each name once")
        return self
