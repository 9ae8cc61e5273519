"""Perplexity of a text over rolling windows, per token and byte, as in lm-evaluation-harness."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailored_llama import models
from tailored_llama.config import Work
from tailored_llama.data import load_texts, loglikelihoods
from tailored_llama.errors import InputError
from tailored_llama.evaluation.settings import PerplexitySettings
from tailored_llama.progress import Progress

Window = tuple[int, int, int]  # start, first, stop


def rolling_windows(length: int, window: int) -> list[Window]:
    """Cut a text into windows that predict each of its tokens once: (start, first, stop) for every window.

    Input token i (the BOS token, then the text) predicts token i of the text. A window reads the inputs from `start`
    to `stop` and scores the tokens from `first` to `stop`. Only the last one reads tokens that it does not score.
    """
    windows = [(0, 0, min(window, length))]
    while (first := windows[-1][2]) < length:
        stop = min(first + window, length)
        windows.append((max(0, stop - window), first, stop))
    return windows


def token_losses(
    model: Any, bos: int, ids: Sequence[int], windows: Sequence[Window], batch_tokens: int, progress: Progress
) -> list[float]:
    """Negative log-likelihood of every token of a text after `bos`, in nats, over `rolling_windows`."""
    inputs, items = [bos, *ids[:-1]], []
    for start, first, stop in windows:
        document, scored = models.Document(inputs[start:stop]), range(first - start, stop - start)
        items.append(models.Encoded(document, [[i] for i in scored], [[token] for token in ids[first:stop]]))
    return [-value for window in loglikelihoods(model, items, batch_tokens, progress) for value in window]


def measure_perplexity(
    checkpoint: Path, text_of: Path | None = None, *, settings: PerplexitySettings, work: Work
) -> dict[str, Any]:
    """Stage: measure the perplexity of a text; write `metrics.json`.

    Documents are joined by blank lines. `perplexity` is per token, `byte_perplexity` per UTF-8 byte, which compares
    models with different tokenizers. Every token of the text is scored; the first one follows the BOS token. Known
    deviation: if a tokenizer adds a BOS token itself (Llama's do), lm-evaluation-harness scores that token too.

    The tokens of `text_of`, by default the same model, are counted to find the end of the text. So a model with fewer
    tokens is measured on the text of its dense model; only perplexities per byte compare the two. `whole` is then the
    share of the dense model's tokens of that text that it has: other words are written in pieces.

    Raises:
        InputError: the text has no token, or the window is longer than the model's context.
    """
    text, window = settings.text, settings.window
    whole = "\n\n".join(load_texts(text, work.downloads))
    if settings.tokens:
        whole = whole[: settings.tokens * 32]  # ample for that many tokens: do not tokenize the rest
    model, tokenizer = models.open_model(checkpoint, work.execution, work.out), models.load_tokenizer(checkpoint)
    if window > (limit := model.config.max_position_embeddings):
        raise InputError(f"perplexity.window: got {window}; allowed: at most {limit}, the model's context")
    cutting = models.load_tokenizer(text_of) if text_of else tokenizer
    ids = cutting.encode(whole, add_special_tokens=False)
    if settings.tokens and len(ids) > settings.tokens:
        ids = ids[: settings.tokens]
        whole = cutting.decode(ids, clean_up_tokenization_spaces=False)
    stay = {}
    if text_of:
        if table := models.read_id_table(checkpoint):
            stay = {"whole": sum(token in table.kept for token in ids) / max(1, len(ids))}
        ids = tokenizer.encode(whole, add_special_tokens=False)
    if not ids:
        raise InputError(f"perplexity.source {text.name}: got no token; allowed: a text of at least one token")
    windows = rolling_windows(len(ids), window)
    budget = models.token_budget(work.execution.batch_tokens, model)
    loss = math.fsum(token_losses(model, models.first_token(tokenizer), ids, windows, budget, work.progress))
    per_token, per_byte = math.exp(loss / len(ids)), math.exp(loss / len(whole.encode("utf-8")))
    result = {"perplexity": per_token, "byte_perplexity": per_byte, "tokens": len(ids), "window": window} | stay
    (work.out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    return {"tokens": len(ids)}
