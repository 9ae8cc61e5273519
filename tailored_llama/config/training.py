"""Sections on training: adapters and tuning."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from tailored_llama.config.section import Section

FEW_SHOTS = 50  # the paper's
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


class AdapterConfig(Section):
    """An adapter for a task, how it is trained, and when its training ends."""

    rank: int = Field(8, ge=1, le=1024, description="LoRA rank r: the width of each update.")
    alpha: int = Field(16, ge=1, le=4096, description="LoRA scale α; updates are multiplied by α / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of each adapter.")
    targets: tuple[Projection, ...] = Field(PROJECTIONS, min_length=1, description="Projections that get an adapter.")
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products over float32 weights; bfloat16 is about twice as fast where the hardware has it.
    Where the checkpoint is in bfloat16, its products are in bfloat16 in any case. What is trained, gradients and the
    optimiser stay in float32, other weights in the checkpoint's type."""
    learning_rate: float = Field(5e-4, gt=0, le=1, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule, by its name in transformers; constant has no warm-up."""
    warmup: float = Field(0.1, ge=0, lt=1, description="Fraction of the steps used for warm-up.")
    batch_size: int = Field(4, ge=1, description="Examples per optimiser step.")
    micro_batch_tokens: int = Field(2048, ge=64)
    """Tokens in one forward pass of a step, halved when memory runs out. Each pass draws its own dropout."""
    epochs: int = Field(3, ge=1, le=1000, description="Maximum passes over the training examples.")
    patience: int = Field(2, ge=1, description="Epochs without a lower held-out loss before tuning stops.")


class TuningConfig(AdapterConfig):
    """LoRA on a few examples of one benchmark (arXiv 2410.19185, section 4)."""

    examples: Literal["benchmark", "mixture", "none"] = "benchmark"
    """benchmark: one adapter per benchmark, trained on its own examples; mixture: one adapter, trained on as many
    examples in total, drawn from all benchmarks; none: no adapter."""
    shots: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Training examples, drawn from the train split by seed. auto: of a file that is divided (benchmarks.data), as many
    as `tokens` allows beside those held out; of other benchmarks 50, as in the paper."""
    tokens: int = Field(100_000, ge=1)
    """With shots = auto: tokens of shots that a training reads in all its epochs. Four bytes of text count as one, so
    that every model is tuned on the same rows. The benchmarks of a mixture have equal parts."""
    held_out: int = Field(50, ge=0)
    """Further train examples, for early stopping and to compare the adapter with none; 0: neither. Of a file that is
    divided (benchmarks.data), at most as many."""
    keep: Literal["better", "always"] = "better"
    """Whether a finished model (store.export) gets its adapter. better: if the adapter is better than none on the
    held-out examples by more than their error, or if fewer than 20 are held out and it is not worse; otherwise the
    untuned model is exported. always: in any case. Scores of the tailored model are reported either way."""
    dense: bool = True
    """Flows tailor and sweep, where the pruned model is tuned: also tune the dense model on the same shots, and score
    it: what pruning really costs after tailoring."""
