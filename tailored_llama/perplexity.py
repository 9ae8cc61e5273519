"""Perplexity of a text by sliding windows, as lm-evaluation-harness takes it: per token, per word, per byte."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tailored_llama.config import ExecutionConfig, PerplexityConfig
from tailored_llama.errors import InputError
from tailored_llama.models import load, load_tokenizer
from tailored_llama.packing import Document, packed_attention, packed_logprobs, token_budget, within_memory
from tailored_llama.progress import Progress, silent
from tailored_llama.texts import load_texts
from tailored_llama.tokens import first_token


def sliding_windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Cut a text so that each of its tokens is predicted once: (start, first, stop) for every window.

    Input token i (the BOS token, then the text) predicts token i of the text. A window reads the inputs from `start`
    and scores the tokens from `first` up to `stop`: `window` of them in the first one, then `stride` in each, the last
    of as many inputs as the window holds. These are lm-evaluation-harness's rolling windows, which have a stride of
    `window` (context_len 1); there a smaller stride is a context_len of window − stride + 1.
    """
    windows = [(0, 0, min(window, length))]
    while (first := windows[-1][2]) < length:
        stop = min(first + stride, length)
        windows.append((max(0, stop - window), first, stop))
    return windows


def token_losses(
    model: Any, tokenizer: Any, ids: Sequence[int], window: int, stride: int, batch_tokens: int, progress: Progress
) -> list[float]:
    """Negative log-likelihood of every token of a text, in nats, by `sliding_windows`."""
    inputs = [first_token(tokenizer), *ids[:-1]]
    windows = sliding_windows(len(ids), window, stride)
    losses = [math.nan] * len(ids)
    done = 0
    with torch.inference_mode(), packed_attention(model):
        lengths = [stop - start for start, _, stop in windows]
        run = partial(_score_windows, model, inputs, ids, windows)
        for batch, found in within_memory(lengths, batch_tokens, run):
            values = iter(found)
            for _, first, stop in (windows[i] for i in batch):
                losses[first:stop] = islice(values, stop - first)
            done += len(batch)
            progress(done, len(windows))
    return losses


def _score_windows(
    model: Any,
    inputs: Sequence[int],
    ids: Sequence[int],
    windows: Sequence[tuple[int, int, int]],
    batch: Sequence[int],
) -> list[float]:
    documents: list[Document] = []
    positions: list[int] = []
    targets: list[int] = []
    row = 0
    for start, first, stop in (windows[i] for i in batch):
        documents.append(Document(inputs[start:stop]))
        positions += range(row + first - start, row + stop - start)
        targets += ids[first:stop]
        row += stop - start
    losses: list[float] = (-packed_logprobs(model, documents, positions, targets)).tolist()
    return losses


def measure_perplexity(
    checkpoint: Path,
    perplexity: PerplexityConfig,
    downloads: str,
    out: Path,
    execution: ExecutionConfig,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: perplexity of a text; write `metrics.json`.

    Documents are joined by blank lines. `perplexity` is per token, `word_perplexity` per run of characters between
    white space, `byte_perplexity` per byte of UTF-8; the last two compare models of different tokenizers. Every token
    of the text is scored, the first one after the BOS token. A known deviation: where a tokenizer adds a BOS token
    itself (Llama's do), lm-evaluation-harness scores that one too.

    Raises:
        InputError: the text has no token, or the window is longer than the model's context.
    """
    text = "\n\n".join(load_texts(perplexity, downloads))
    if perplexity.tokens:
        text = text[: perplexity.tokens * 32]  # far more than that many tokens: spare the tokenizer the rest
    model, tokenizer = load(checkpoint, device=execution.device), load_tokenizer(checkpoint)
    if perplexity.window > (limit := model.config.max_position_embeddings):
        raise InputError(f"perplexity.window: got {perplexity.window}; allowed: at most {limit}, the model's context")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if perplexity.tokens and len(ids) > perplexity.tokens:
        ids = ids[: perplexity.tokens]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if not ids:
        raise InputError(f"perplexity.source {perplexity.source}: no token; allowed: a text of at least one")
    stride = perplexity.stride or perplexity.window
    budget = token_budget(execution.batch_tokens, model)
    losses = token_losses(model, tokenizer, ids, perplexity.window, stride, budget, progress)
    result = text_metrics(math.fsum(losses), len(ids), text) | {"window": perplexity.window, "stride": stride}
    (out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    return {"tokens": len(ids)}


def text_metrics(loss: float, tokens: int, text: str) -> dict[str, Any]:
    """Perplexities of a text from its summed loss in nats, with lm-evaluation-harness's words and bytes."""
    words, size = len(re.split(r"\s+", text)), len(text.encode("utf-8"))
    return {
        "perplexity": math.exp(loss / tokens),
        "word_perplexity": math.exp(loss / words),
        "byte_perplexity": math.exp(loss / size),
        "bits_per_byte": loss / size / math.log(2),
        "tokens": tokens,
        "words": words,
        "bytes": size,
    }
