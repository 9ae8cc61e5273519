"""Texts as token ids, as lm-evaluation-harness encodes them, and the pre-tokenizers of GGUF files."""

import json
from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from tailored_llama.errors import InputError


def first_token(tokenizer: Any) -> int:
    """The token that stands for an empty context: BOS, or EOS if there is no BOS; InputError if there is neither."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise InputError("tokenizer: has neither a BOS nor an EOS token; allowed: a tokenizer with one of them")
    return int(token)


def with_end(known: int | list[int] | None, token: int) -> list[int]:
    """The tokens that end what a model writes, with another one in front."""
    others = known if isinstance(known, list) else [] if known is None else [known]
    return [token, *(other for other in others if other != token)]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids, with the special tokens that the tokenizer adds unless the text starts with BOS already."""
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not has_bos)
    return ids


def special_around(tokenizer: Any, text: str) -> tuple[str, str]:
    """The special token that is added before a text, and the one that ends texts; empty: none."""
    has_bos = encode(tokenizer, text)[:1] == [tokenizer.bos_token_id] and not text.startswith(tokenizer.bos_token)
    return tokenizer.bos_token if has_bos else "", tokenizer.eos_token or ""


def encode_pair(tokenizer: Any, context: str, continuation: str, is_chat: bool = False) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation, as in lm-evaluation-harness.

    Trailing white space of the context moves to the continuation. Both are encoded together and split at the length of
    the encoded context. A context without tokens becomes the BOS (or EOS) token. In a chat the context stays as a
    server reads it.
    """
    if is_chat:
        before, whole = encode(tokenizer, context), encode(tokenizer, context + continuation)
        is_apart = whole[: len(before)] == before
        return before, whole[len(before) :] if is_apart else tokenizer.encode(continuation, add_special_tokens=False)
    bare = context.rstrip() if context else ""
    continuation, context = context[len(bare) :] + continuation, bare
    if not context:
        first = first_token(tokenizer)
        ids = tokenizer.encode(continuation, add_special_tokens=False)
        return [first], ids[1:] if ids and ids[0] == first else ids
    whole = encode(tokenizer, context + continuation)
    cut = len(encode(tokenizer, context))
    return whole[:cut], whole[cut:]


# Values of `tokenizer.ggml.pre` for which llama.cpp cuts every digit off, then applies GPT-2's rule.
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def pre_tokenizer(name: str) -> Any:
    """The pre-tokenizer that llama.cpp applies for a value of `tokenizer.ggml.pre`; None if it is not known here."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _DIGITS_APART:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name in ("gpt-2", "gpt2"):
        return byte_level
    if (split := GGUF_PRE_TOKENIZER_SPLITS.get(name)) is None:
        return None
    isolated = pre_tokenizers.Split(Regex(split), behavior="isolated")
    return pre_tokenizers.Sequence([isolated, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def pre_tokenizer_name(tokenizer: Any, shown: Any) -> str:
    """The value of `tokenizer.ggml.pre` for a byte-level tokenizer; InputError if llama.cpp has no such."""
    state = _cutting(tokenizer.backend_tokenizer.pre_tokenizer)
    names = ("smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35")
    for name in names:
        if _cutting(pre_tokenizer(name)) == state:
            return name
    raise InputError(f"{shown}: pre-tokenizer: got {json.dumps(state)[:200]}; allowed: that of {', '.join(names)}")


def _cutting(pre: Any) -> Any:
    """Return what a pre-tokenizer's state says of where it cuts; None if there is none."""
    if pre is None:
        return None
    state = json.loads(pre.__getstate__())
    for step in state.get("pretokenizers", [state]):
        step.pop("trim_offsets", None)
    return state
