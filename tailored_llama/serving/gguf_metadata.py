"""The metadata of a GGUF file: name and licence, sizes, rotary embedding, windows, bounds; its tokenizer."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

from tailored_llama.config import GgufType
from tailored_llama.errors import InputError
from tailored_llama.models import CARD, front_matter, load_tokenizer, pre_tokenizer_name
from tailored_llama.serving.gguf_layout import Layout
from tailored_llama.serving.gguf_writing import Array
from tailored_llama.serving.imatrix import Importance
from tailored_llama.serving.job import Job

UNBOUNDED = 1e6  # x → c · tanh(x ÷ c) is x in float32 for such a c


def write_metadata(
    writer: GGUFWriter, layout: Layout, config: Any, checkpoint: Path, name: str, gguf_type: GgufType
) -> None:
    """Write all metadata, the tokenizer's included; an `InputError` if llama.cpp cannot express one of them."""
    writer.add_type("model")
    writer.add_name(name)
    _write_licence(writer, checkpoint)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    kind = f"{'ALL' if gguf_type == 'f32' else 'MOSTLY'}_{gguf_type.upper()}"
    writer.add_file_type(LlamaFileType[kind if kind in LlamaFileType.__members__ else f"{kind}_S"])
    writer.add_vocab_size(config.vocab_size)
    structure = layout.structure
    writer.add_embedding_length(structure.hidden_size)
    writer.add_block_count(structure.depth)
    writer.add_feed_forward_length(layout.channels)
    writer.add_head_count(structure.layer.heads)
    writer.add_head_count_kv(structure.layer.kv_heads)
    for add_head_dim in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add_head_dim(structure.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _write_rope(writer, layout, config, checkpoint)
    family, longest = layout.family, int(config.max_position_embeddings)
    if family.windows:
        _write_windows(writer, config, checkpoint)
    elif family.unwindowed and config.sliding_window:
        got, allowed = config.sliding_window, f"null (in llama.cpp's architecture {layout.name})"
        raise InputError(f"{checkpoint / 'config.json'}: sliding_window: got {got}; allowed: {allowed}")
    elif getattr(config, "use_sliding_window", True) and (window := getattr(config, "sliding_window", None)):
        longest = min(longest, window)  # the graph has no window: the context ends where one would begin to matter
    writer.add_context_length(longest)
    if family.scaled:
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if family.capped:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping or UNBOUNDED)
        writer.add_final_logit_softcapping(config.final_logit_softcapping or UNBOUNDED)
    write_tokenizer(writer, checkpoint, config.vocab_size)


def write_origin(writer: GGUFWriter, by: Job | Importance, matrices: int) -> None:
    """Write what so many matrices are rounded by, as llama.cpp's own tool does; a prompt counts as a chunk of text."""
    writer.add_string("quantize.imatrix.dataset", by.dataset)
    if isinstance(by, Importance) and by.file:
        writer.add_string("quantize.imatrix.file", by.file)
    writer.add_uint32("quantize.imatrix.entries_count", matrices if isinstance(by, Job) else len(by.squares))
    writer.add_uint32("quantize.imatrix.chunks_count", len(by.documents) if isinstance(by, Job) else by.chunks)


def _write_licence(writer: GGUFWriter, checkpoint: Path) -> None:
    """Write what the checkpoint's card states."""
    stated = front_matter(checkpoint / CARD)
    for key in ("license", "license_name", "license_link"):
        if isinstance(value := stated.get(key), str):
            getattr(writer, f"add_{key}")(value)
    if isinstance(base := stated.get("base_model"), str):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")


def _write_rope(writer: GGUFWriter, layout: Layout, config: Any, checkpoint: Path) -> None:
    """Write the base of the rotary frequencies, and their scaling where that is no tensor."""
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    allowed = ["default", "linear", "yarn", *(["llama3"] if layout.family.factors else [])]
    file, where = checkpoint / "config.json", f"in llama.cpp's architecture {layout.name}"
    if kind not in allowed:
        raise InputError(f"{file}: rope_type: got {kind!r}; allowed: {', '.join(allowed)} ({where})")
    if (share := rope.get("partial_rotary_factor", 1)) != 1:
        raise InputError(f"{file}: partial_rotary_factor: got {share}; allowed: 1")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(rope["factor"])
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)
    scales = {
        "mscale_all_dim": writer.add_rope_scaling_yarn_log_mul,
        "llama_4_scaling_beta": writer.add_attn_temperature_scale,
    }
    ramp = {"beta_fast": writer.add_rope_scaling_yarn_beta_fast, "beta_slow": writer.add_rope_scaling_yarn_beta_slow}
    for field, add in (ramp | (scales if layout.family.yarn_scales else {})).items():
        if rope.get(field) is not None:
            add(rope[field])
    for field in ("attention_factor", *(() if layout.family.yarn_scales else ("mscale", *scales))):
        if (got := rope.get(field)) is not None:
            raise InputError(f"{file}: {field}: got {got}; allowed: null ({where})")


def _rope(config: Any) -> dict[str, Any]:
    """The rotary embedding of layers without a window."""
    rope = dict(config.rope_parameters)
    return dict(rope.get("full_attention", rope))


def _write_windows(writer: GGUFWriter, config: Any, checkpoint: Path) -> None:
    """Write the window, which all but the last of every so many layers have: llama.cpp knows no other order."""
    windowed = [kind == "sliding_attention" for kind in config.layer_types]
    period = [*windowed, False].index(False) + 1
    if windowed != [layer % period < period - 1 for layer in range(len(windowed))]:
        full = [layer for layer, is_windowed in enumerate(windowed) if not is_windowed]
        got = f"layer_types: full attention in layers {full}; allowed for llama.cpp: in the last of every so many"
        raise InputError(f"{checkpoint / 'config.json'}: {got}")
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(period)
    if local := config.rope_parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(local["rope_theta"])


def rope_factors(config: Any, head_dim: int) -> Array | None:
    """The factors by which llama.cpp divides the rotary frequencies for Llama 3's scaling; None if there is none."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    original = rope["original_max_position_embeddings"]
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths > original / low, factor, np.where(wavelengths < original / high, 1.0, between))
    return factors.astype(np.float32)


def write_tokenizer(writer: GGUFWriter, checkpoint: Path, vocab_size: int) -> None:
    """Write the tokenizer; rows of the embedding without a token become unused tokens."""
    tokenizer = load_tokenizer(checkpoint)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        kinds = "BPE, byte-level or with byte fallback"
        raise InputError(f"{checkpoint}: tokenizer: got {model['type']}; allowed: {kinds}")
    if not model["merges"]:
        raise InputError(f"{checkpoint}: tokenizer: got no merges; allowed: at least one, which llama.cpp requires")
    added = {token["id"]: token for token in state["added_tokens"]}
    texts = {index: text for text, index in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(texts, model["merges"], vocab_size))
        writer.add_add_space_prefix(_adds_space(state))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer, checkpoint))
        writer.add_token_merges([f"{left} {right}" for left, right in model["merges"]])
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    unknown = tokenizer.unk_token
    writer.add_token_types([_token_type(texts.get(index), added.get(index), unknown) for index in range(vocab_size)])
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        if (index := getattr(tokenizer, name)) is not None:
            getattr(writer, f"add_{name}")(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _scores(texts: dict[int, str], merges: list[list[str]], vocab_size: int) -> list[float]:
    """A score for each token, from which llama.cpp derives the order of merges: the higher, the sooner."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
    return [-float(first.get(texts.get(index, ""), len(merges))) for index in range(vocab_size)]


def _adds_space(state: dict[str, Any]) -> bool:
    """Return whether text gets a space in front, by a normaliser or a pre-tokenizer."""
    steps = [state.get("normalizer") or {}, state.get("pre_tokenizer") or {}]
    steps += [step for outer in steps for step in outer.get("normalizers", []) + outer.get("pretokenizers", [])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _token_type(text: str | None, added: dict[str, Any] | None, unknown: str | None) -> TokenType:
    if text is None:
        return TokenType.UNUSED
    if text == unknown and not text.startswith("<|"):  # a byte-level vocabulary names its end of text instead
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else TokenType.NORMAL
