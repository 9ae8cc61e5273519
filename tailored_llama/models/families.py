"""The model types that can be pruned, a row for each. CONTRIBUTING says what a new row needs."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from tailored_llama.errors import InputError


@dataclass(frozen=True)
class Family:
    """What sets a model type apart, in llama.cpp above all."""

    gguf: str = ""  # the architecture of llama.cpp that computes the same; empty: there is none
    heads: bool = True  # heads can leave; False: only channels and tokens, as what reads all heads would change
    gated: bool = True  # a channel of the MLP has a gate
    paired: bool = False  # rotary embeddings turn neighbouring channels, so that the rows of q and k change places
    norm_offset: int = 0  # is added to the weights of norms
    windows: bool = False  # some layers attend to a sliding window, and may have rotary frequencies of their own
    unwindowed: bool = False  # such layers cannot be expressed, as others are then without rotary embedding
    capped: bool = False  # it bounds the logits of attention and of the head
    scaled: bool = False  # embeddings, attention, residuals and logits are multiplied
    factors: bool = False  # it reads factors of rotary frequencies, by which Llama 3's scaling is written
    yarn_scales: bool = False  # it reads by how much YaRN scales attention, and by how much a position does
    no_rope_step: int = 0  # one layer in so many is without rotary embedding; 0: none
    queries: Literal["", "q_proj", "q_norm"] = (
        ""  # the weight that a scale of queries goes into, as a file does not state it
    )
    from_gguf: bool = False  # transformers reads its GGUF files
    twin: str = ""  # a type whose layers are coupled alike, with projections apart


_LLAMA = Family("llama", paired=True, factors=True, from_gguf=True)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral3": Family("mistral3", paired=True, yarn_scales=True),
    "qwen2": Family("qwen2", from_gguf=True),
    "qwen3": Family("qwen3", from_gguf=True),
    "smollm3": Family("smollm3", paired=True, no_rope_step=4),
    "gemma": Family("gemma", norm_offset=1),
    "gemma2": Family("gemma2", capped=True, queries="q_proj", norm_offset=1, windows=True, from_gguf=True),
    "gemma3_text": Family("gemma3", queries="q_norm", norm_offset=1, windows=True, from_gguf=True),
    # Unfused: llama.cpp's phi3 needs as many channels in all heads as in the hidden states.
    "phi3": replace(_LLAMA, twin="mistral"),
    "granite": Family("granite", paired=True, scaled=True),
    "exaone4": Family("exaone4", unwindowed=True, factors=True),
    "hunyuan_v1_dense": Family("hunyuan-dense"),
    "ernie4_5": Family("ernie4_5"),
    "seed_oss": Family("seed_oss"),
    "cwm": Family(),
    "olmo2": Family("olmo2", heads=False),  # a norm over all heads
    "olmo3": Family("olmo2", heads=False, windows=True),
    "glm": Family(twin="mistral"),
    "glm4": Family(twin="mistral"),
    "arcee": Family("arcee", gated=False, paired=True),
    "apertus": Family(gated=False),
    "helium": Family(heads=False),  # o_proj is as wide as the hidden states
}
IN_GGUF = tuple(kind for kind, family in FAMILIES.items() if family.gguf)


def check_architecture(config: dict[str, Any], shown: str) -> None:
    """Raise InputError if an architecture is not supported, or its weights are quantized."""
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise InputError(f"model.source {shown}: architecture {kind}; allowed: {', '.join(FAMILIES)}")
    if config.get("quantization_config"):
        raise InputError(f"model.source {shown}: quantized weights; allowed: float32, bfloat16 or float16")
