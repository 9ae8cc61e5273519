"""Written answers: greedy generation, exact match and F1 as SQuAD defines them (arXiv 1606.05250, section 6.1)."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from tailored_llama.errors import InputError
from tailored_llama.packing import token_budget, within_memory
from tailored_llama.progress import Progress, silent
from tailored_llama.prompts import Prompt
from tailored_llama.soft_prompts import has_soft_prompt
from tailored_llama.tokens import encode

ANSWERS_SCHEMA = pa.schema(
    {
        "example": pa.int32(),
        "text": pa.string(),  # what the model wrote
        "accepted": pa.list_(pa.string()),
        "exact_match": pa.float64(),
        "f1": pa.float64(),
        "loglikelihood": pa.float64(),  # of the first accepted text after the prompt
        "tokens": pa.int32(),  # of that text
    }
)


def generate(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[str],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_tokens: int | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Continue every context greedily, up to a stop string (left out) or the end-of-text token.

    Contexts of similar length share a batch, padded on the left, with at most `batch_tokens` tokens (absent: what suits
    the device), padding and new ones counted; where memory runs out, with half as many from then on. A context too long
    for the model loses its start.

    Raises:
        InputError: a soft prompt, a context without a token, or more new tokens than the model's context holds.
    """
    if has_soft_prompt(model):  # PEFT 0.21's own generate answers otherwise than its forward pass
        raise InputError(
            "adapter: is a soft prompt; allowed: one that changes weights (LoRA and its kin), to write answers"
        )
    limit = model.config.max_position_embeddings
    if max_new_tokens >= limit:
        raise InputError(f"max_new_tokens: got {max_new_tokens}; allowed: less than {limit}, the model's context")
    encoded = [encode(tokenizer, context)[max_new_tokens - limit :] for context in contexts]
    if (empty := next((i for i, ids in enumerate(encoded) if not ids), None)) is not None:
        raise InputError(f"prompt {empty}: got {contexts[empty]!r}; allowed: a text of at least one token")
    budget = token_budget(batch_tokens, model)
    texts = [""] * len(contexts)
    done = 0
    run = partial(_generate_batch, model, tokenizer, encoded, max_new_tokens, list(stop))
    for batch, found in within_memory([len(ids) + max_new_tokens for ids in encoded], budget, run, padded=True):
        for index, text in zip(batch, found, strict=True):
            texts[index] = text
        done += len(batch)
        progress(done, len(contexts))
    return texts


def _generate_batch(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    max_new_tokens: int,
    stop: list[str],
    batch: Sequence[int],
) -> list[str]:
    longest = max(len(encoded[i]) for i in batch)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = [[padding] * (longest - len(encoded[i])) + encoded[i] for i in batch]
    seen = [[0] * (longest - len(encoded[i])) + [1] * len(encoded[i]) for i in batch]
    with torch.inference_mode():
        written = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(seen, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=padding,
            stopping_criteria=StoppingCriteriaList([_Written(tokenizer, longest, stop)] if stop else []),
        )
    texts = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return [_before(text, stop) for text in texts]


class _Written(StoppingCriteria):
    """A sequence is done once a stop string stands in what has been written; transformers' own reads the prompt too."""

    def __init__(self, tokenizer: Any, start: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.start, self.stop = tokenizer, start, stop

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        done = [any(mark in text for mark in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _before(text: str, stop: Sequence[str]) -> str:
    """The part before the first stop string."""
    return text[: min((at for mark in stop if (at := text.find(mark)) >= 0), default=len(text))]


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(text: str, accepted: Sequence[str]) -> float:
    """1 where the text is one of the accepted ones in normal form, else 0."""
    return float(normalise(text) in map(normalise, accepted))


def f1(text: str, accepted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words in normal form, against the accepted text it fits best."""
    return max(_f1(normalise(text).split(), normalise(one).split()) for one in accepted)


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, list[Any]]:
    """The columns of `answers.parquet` that compare what was written with what is accepted."""
    columns: dict[str, list[Any]] = {name: [] for name in ("example", "text", "accepted", "exact_match", "f1")}
    for prompt, text in zip(prompts, texts, strict=True):
        accepted = [continuation.strip() for continuation in prompt.continuations]
        row = (prompt.example, text.strip(), accepted, exact_match(text, accepted), f1(text, accepted))
        for name, value in zip(columns, row, strict=True):
            columns[name].append(value)
    return columns


def answer_perplexity(loglikelihoods: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the negative log-likelihood per token, over the tokens of all answers."""
    return math.exp(-math.fsum(loglikelihoods) / sum(tokens))


def floor(prompts: Sequence[Prompt], metric: str) -> float:
    """What no skill scores: always writing the text that, of those accepted anywhere, does best in the metric.

    Of the accepted texts, in normal form, the 50 commonest are tried.
    """
    accepted = Counter(text for prompt in prompts for text in set(map(normalise, prompt.continuations)))
    judged = {"exact_match": exact_match, "f1": f1}[metric]
    best = [sum(judged(text, prompt.continuations) for prompt in prompts) for text, _ in accepted.most_common(50)]
    return max(best) / len(prompts)
