"""Prompts as tokens: packed documents, the positions at which choices are scored, and the choices' log-likelihoods."""

import math
from collections.abc import Sequence
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from tailored_llama import models
from tailored_llama.data.prompts import Prompt
from tailored_llama.errors import InputError
from tailored_llama.progress import Progress, silent

WORTH_A_PASS = 64  # tokens; a header that saves fewer is not worth a pass of its own


def encode_prompt(tokenizer: Any, prompt: Prompt, max_length: int, end: Sequence[int] = ()) -> models.Encoded:
    """Tokenise every choice of a prompt and find the prefix they share; a context that is too long loses its start.

    The tokens `end` follow every choice.

    InputError: a continuation has no token of its own, or more than the model's context holds.
    """
    inputs: list[list[int]] = []
    targets: list[list[int]] = []
    truncated = False
    for context, continuation in zip(prompt.contexts, prompt.continuations, strict=True):
        before, after = models.encode_pair(tokenizer, context, continuation, bool(prompt.end))
        if not after:
            raise InputError(
                f"example {prompt.example}: got the continuation {continuation!r}, which the tokenizer merges into "
                "its context; allowed: a continuation with a token of its own"
            )
        after = [*after, *end]
        if len(after) > max_length:
            raise InputError(
                f"row {prompt.example}: got an answer of {len(after)} tokens, which begins with "
                f"{continuation.strip()[:40]!r}; allowed: at most {max_length}, the model's context"
            )
        sequence = (before + after)[-(max_length + 1) :]
        truncated |= len(sequence) < len(before) + len(after)
        inputs.append(sequence[:-1])
        targets.append(after)
    return encode_choices(inputs, targets, truncated)


def end_of(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token after an answer, if there is one: the end of text, or what a base's chat template writes there."""
    end = tokenizer.convert_tokens_to_ids(prompt.end) if prompt.end else tokenizer.eos_token_id
    return [] if end is None else [end]


def encode_choices(
    inputs: Sequence[list[int]], targets: Sequence[Sequence[int]], truncated: bool = False
) -> models.Encoded:
    """One document of what a model reads for every choice, which ends before the last of the choice's targets."""
    shared = len(common_prefix(inputs))
    document = models.Document(inputs[0][:shared], [ids[shared:] for ids in inputs])
    positions = tuple(
        tuple(document.offset(branch, p) for p in range(len(ids) - len(target), len(ids)))
        for branch, (ids, target) in enumerate(zip(inputs, targets, strict=True))
    )
    return models.Encoded(document, positions, tuple(map(tuple, targets)), truncated)


def encode_answer(tokenizer: Any, prompt: Prompt, max_length: int, end: Sequence[int] = ()) -> models.Encoded:
    """Only the right choice of a prompt, tokenised as by `encode_prompt`."""
    right = prompt.answer
    alone = Prompt(prompt.example, (prompt.contexts[right],), (prompt.continuations[right],), 0, (1,), prompt.end)
    return encode_prompt(tokenizer, alone, max_length, end)


def common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """The longest prefix that all sequences share."""
    low, high = min(sequences), max(sequences)  # what these two share, all sequences share
    shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:shared]


def shared_header(encoded: Sequence[models.Encoded]) -> list[int]:
    """The tokens that all prompts start with, such as solved examples, up to the first scored position.

    Empty if encoding them once, in a pass of their own, would save too little.
    """
    if len(encoded) < 2:
        return []
    shared = common_prefix([list(item.document.prefix) for item in encoded])
    shared = shared[: min(min(choice[0] for choice in item.positions) for item in encoded)]
    return shared if len(shared) * (len(encoded) - 1) >= WORTH_A_PASS else []


def loglikelihoods(
    model: Any, encoded: Sequence[models.Encoded], batch_tokens: int, progress: Progress = silent
) -> list[list[float]]:
    """Summed log-probability of every choice of every prompt, as `token_logprobs`."""
    return [[*map(math.fsum, choices)] for choices in token_logprobs(model, encoded, batch_tokens, progress)]


def token_logprobs(
    model: Any, encoded: Sequence[models.Encoded], batch_tokens: int, progress: Progress = silent
) -> list[list[list[float]]]:
    """The log-probability of every token of every choice of every prompt, in the given order.

    The common start of all prompts is encoded once. Prompts are packed by length, at most `batch_tokens` tokens per
    forward pass. When memory runs out, that budget is halved for the remaining prompts.
    """

    def finish(row: models.PackedRow, states: Tensor) -> list[float]:
        return models.target_logprobs(model, states, row.positions, row.targets).tolist()

    results: list[list[list[float]]] = [[] for _ in encoded]
    whole = [i for i, item in enumerate(encoded) if not item.truncated]
    cut = [i for i, item in enumerate(encoded) if item.truncated]  # they start at different points: no common header
    done = count(1)
    with torch.inference_mode(), models.packed_attention(model):
        for members in filter(None, (whole, cut)):
            shared = shared_header([encoded[i] for i in members])
            group = [encoded[i].after(len(shared)) for i in members]
            for batch, logprobs in models.run_packed(model, group, batch_tokens, finish, shared):
                values = iter(logprobs)  # one for each target
                for i in batch:
                    results[members[i]] = [list(islice(values, len(wanted))) for wanted in group[i].targets]
                    progress(next(done), len(encoded))
    return results


def score_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], writes: bool, batch_tokens: int, progress: Progress = silent
) -> tuple[list[models.Encoded], list[list[float]], list[int]]:
    """Encoded prompts, the log-likelihoods of their choices, and the choices that are written, if the model `writes`.

    They are written greedily, where nothing else is allowed, in the tokens that were tuned, each with its end.
    """
    ends, limit = [end_of(tokenizer, prompt) if writes else [] for prompt in prompts], models.context_length(model)
    encoded = [encode_prompt(tokenizer, prompt, limit, end) for prompt, end in zip(prompts, ends, strict=True)]
    told = token_logprobs(model, encoded, batch_tokens, progress)
    pairs = zip(encoded, told, strict=True) if writes else ()
    written = [_written(item.targets, choices) for item, choices in pairs]
    return encoded, [[*map(math.fsum, choices)] for choices in told], written


def _written(targets: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> int:
    """The choice that is written token by token, each the likeliest of those that begin a choice or go on with it.

    Where one begins another, as without an end that is tuned, the shorter one is written.
    """
    left = list(range(len(targets)))
    for position in count():
        best = max(left, key=lambda choice: logprobs[choice][position])
        left = [choice for choice in left if targets[choice][position] == targets[best][position]]
        best = min(left, key=lambda choice: len(targets[choice]))
        if len(left) == 1 or position + 1 == len(targets[best]):
            break
    return best
