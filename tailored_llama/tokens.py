"""Texts as token ids, as lm-evaluation-harness encodes them."""

from __future__ import annotations

from typing import Any

from tailored_llama.errors import InputError


def first_token(tokenizer: Any) -> int:
    """What stands for an empty context: the BOS token, or EOS where there is none.

    Raises:
        InputError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("tokenizer: has neither a BOS nor an EOS token; allowed: a tokenizer with one of them")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids with the special tokens that the tokenizer adds, BOS not twice where the text starts with it."""
    starts = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not starts)
    return ids


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation, cut as lm-evaluation-harness cuts them.

    Trailing white space of the context goes to the continuation; both are encoded together and cut at the length of
    the encoded context. A context without a token becomes the BOS (or EOS) token.
    """
    bare = context.rstrip() if context else ""
    continuation, context = context[len(bare) :] + continuation, bare
    if not context:
        first = first_token(tokenizer)
        ids = tokenizer.encode(continuation, add_special_tokens=False)
        return [first], ids[1:] if ids and ids[0] == first else ids
    whole = encode(tokenizer, context + continuation)
    cut = len(encode(tokenizer, context))
    return whole[:cut], whole[cut:]
