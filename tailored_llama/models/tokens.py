"""Texts as token ids, as lm-evaluation-harness encodes them."""

from __future__ import annotations

from typing import Any

from tailored_llama.errors import InputError


def first_token(tokenizer: Any) -> int:
    """The token that stands for an empty context: BOS, or EOS if there is no BOS.

    Raises:
        InputError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("tokenizer: has neither a BOS nor an EOS token; allowed: a tokenizer with one of them")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids, with the special tokens that the tokenizer adds unless the text starts with BOS already."""
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not has_bos)
    return ids


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation, split as in lm-evaluation-harness.

    Trailing white space of the context moves to the continuation. Both are encoded together and split at the length of
    the encoded context. A context without tokens becomes the BOS (or EOS) token.
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
