"""The model types, a row for each, and what can leave them. CONTRIBUTING says what a new row needs."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from tailored_llama.errors import InputError

EMBEDDING = "model.embed_tokens.weight"
Level = Literal["all", "channels", "tokens"]


@dataclass(frozen=True)
class Family:
    """What sets a model type apart, in llama.cpp above all."""

    gguf: str = ""  # the architecture of llama.cpp that computes the same; empty: there is none
    converted: bool = False  # llama.cpp's own converter writes its GGUF files
    # What can leave: tokens, heads and channels; tokens and channels, where heads cannot; or only tokens.
    level: Level = "all"
    packed: bool = True  # all its layers are attention and an MLP, so that texts that share a row stay apart
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


_TOKENS = Family(level="tokens", packed=False)
_CONVERTED = replace(_TOKENS, converted=True)
_HYBRID = Family(level="channels", packed=False, twin="mistral")
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
    "olmo2": Family("olmo2", level="channels"),  # a norm over all heads
    "olmo3": Family("olmo2", level="channels", windows=True),
    "glm": Family(twin="mistral"),  # llama.cpp needs as many channels in all heads as in the hidden states
    "glm4": Family("glm4", twin="mistral", converted=True),
    "arcee": Family("arcee", gated=False, paired=True),
    "apertus": Family("apertus", gated=False, converted=True),
    "helium": Family(level="channels"),  # o_proj is as wide as the hidden states
    # Hybrids, whose layers are attention, convolutions or state-space models. The first two have an ordinary MLP.
    "qwen3_5_text": replace(_HYBRID, gguf="qwen35", converted=True),
    "olmo_hybrid": _HYBRID,
    "lfm2": replace(_CONVERTED, gguf="lfm2", from_gguf=True),
    "granitemoehybrid": replace(_CONVERTED, gguf="granitehybrid"),
    "falcon_h1": replace(_CONVERTED, gguf="falcon-h1"),
    # Attention of two widths, and keys that several layers share
    "gemma4_text": replace(_CONVERTED, gguf="gemma4"),
    "nemotron": replace(_CONVERTED, gguf="nemotron", from_gguf=True),  # torch-pruning never ends on its graph
    # Mixtures of experts
    "mixtral": replace(_CONVERTED, gguf="llama"),
    "qwen3_moe": replace(_CONVERTED, gguf="qwen3moe"),
    "olmoe": replace(_CONVERTED, gguf="olmoe"),
    "gpt_oss": replace(_CONVERTED, gguf="gpt-oss"),
    "granitemoe": replace(_CONVERTED, gguf="granitemoe"),
    "lfm2_moe": replace(_CONVERTED, gguf="lfm2moe"),
}
ALLOWED = (
    f"allowed: {', '.join(FAMILIES)}, or another decoder of transformers with {EMBEDDING}, of which only tokens leave"
)
IN_GGUF = tuple(kind for kind, family in FAMILIES.items() if family.gguf)


def family_of(model_type: str) -> Family:
    """The row of a model type; of one without a row, only tokens can leave."""
    return FAMILIES.get(model_type, _TOKENS)


def check_architecture(config: dict[str, Any], shown: str) -> None:
    """Raise InputError if transformers has no decoder of an architecture, or its weights are quantized."""
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # late: it takes a second

        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise InputError(f"model.source {shown}: architecture {kind}; {ALLOWED}")
    if config.get("quantization_config"):
        raise InputError(f"model.source {shown}: quantized weights; allowed: float32, bfloat16 or float16")
