"""Prompts as tokens: the packed document of a prompt, and the positions at which its choices are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tailored_llama.data.prompts import Prompt
from tailored_llama.errors import InputError
from tailored_llama.models import Document, Encoded, encode_pair

WORTH_A_PASS = 64  # tokens; a header that saves fewer is not worth a pass of its own


def encode_prompt(tokenizer: Any, prompt: Prompt, max_length: int) -> Encoded:
    """Tokenise every choice of a prompt and find the prefix they share; a context that is too long loses its start.

    Raises:
        InputError: a continuation has no token of its own, or more than the model's context holds.
    """
    inputs: list[list[int]] = []
    targets: list[list[int]] = []
    truncated = False
    for context, continuation in zip(prompt.contexts, prompt.continuations, strict=True):
        before, after = encode_pair(tokenizer, context, continuation)
        if not after:
            raise InputError(
                f"example {prompt.example}: got the continuation {continuation!r}, which the tokenizer merges into "
                "its context; allowed: a continuation with a token of its own"
            )
        if len(after) > max_length:
            raise InputError(
                f"example {prompt.example}: got a continuation of {len(after)} tokens; allowed: at most {max_length}, "
                "the model's context"
            )
        sequence = (before + after)[-(max_length + 1) :]
        truncated |= len(sequence) < len(before) + len(after)
        inputs.append(sequence[:-1])
        targets.append(after)
    return encode_choices(inputs, targets, truncated)


def encode_choices(inputs: Sequence[list[int]], targets: Sequence[Sequence[int]], truncated: bool = False) -> Encoded:
    """One document of what a model reads for every choice, which ends before the last of the choice's targets."""
    shared = len(common_prefix(inputs))
    document = Document(inputs[0][:shared], [ids[shared:] for ids in inputs])
    positions = tuple(
        tuple(document.offset(branch, p) for p in range(len(ids) - len(target), len(ids)))
        for branch, (ids, target) in enumerate(zip(inputs, targets, strict=True))
    )
    return Encoded(document, positions, tuple(map(tuple, targets)), truncated)


def encode_answer(tokenizer: Any, prompt: Prompt, max_length: int) -> Encoded:
    """Only the right choice of a prompt, tokenised as by `encode_prompt`."""
    right = prompt.answer
    alone = Prompt(prompt.example, (prompt.contexts[right],), (prompt.continuations[right],), 0, (1,))
    return encode_prompt(tokenizer, alone, max_length)


def common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """The longest prefix that all sequences share."""
    low, high = min(sequences), max(sequences)  # what these two share, all sequences share
    shared = next((i for i, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))
    return low[:shared]


def shared_header(encoded: Sequence[Encoded]) -> list[int]:
    """The tokens that all prompts start with, such as solved examples, up to the first scored position.

    Empty if encoding them once, in a pass of their own, would save too little.
    """
    if len(encoded) < 2:
        return []
    shared = common_prefix([list(item.document.prefix) for item in encoded])
    shared = shared[: min(min(choice[0] for choice in item.positions) for item in encoded)]
    return shared if len(shared) * (len(encoded) - 1) >= WORTH_A_PASS else []
