"""Scoring: log-likelihood of every choice, accuracies as lm-evaluation-harness defines them, and perplexity."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tailored_llama.artifacts import read_table, write_table
from tailored_llama.benchmarks import headline_metric
from tailored_llama.config import BenchmarkConfig, ExecutionConfig, PerplexityConfig
from tailored_llama.errors import InputError
from tailored_llama.models import load, load_tokenizer
from tailored_llama.packing import Document, batches, packed_attention, packed_logits
from tailored_llama.progress import Progress, silent
from tailored_llama.prompts import Prompt, read_prompts
from tailored_llama.texts import load_texts

PREDICTIONS_SCHEMA = pa.schema(
    {
        "example": pa.int32(),
        "loglikelihoods": pa.list_(pa.float64()),
        "prediction": pa.int32(),
        "prediction_norm": pa.int32(),
        "answer": pa.int32(),
    }
)


@dataclass(frozen=True)
class Encoded:
    """One prompt as tokens: the packed document, and for every choice the row positions and targets it is scored on."""

    document: Document
    positions: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation, cut as lm-evaluation-harness cuts them.

    Trailing white space of the context goes to the continuation; both are encoded together and cut at the length of
    the encoded context. An empty context becomes the BOS (or EOS) token.
    """
    if not context:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = tokenizer.encode(continuation, add_special_tokens=False)
        return ([], ids) if ids and ids[0] == first else ([first], ids)
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    whole = tokenizer.encode(context + continuation)
    cut = len(tokenizer.encode(context))
    return whole[:cut], whole[cut:]


def encode_prompt(tokenizer: Any, prompt: Prompt, max_length: int) -> Encoded:
    """Tokenise every choice of a prompt and find the prefix they share; long contexts lose their start."""
    inputs: list[list[int]] = []
    targets: list[tuple[int, ...]] = []
    for context, continuation in zip(prompt.contexts, prompt.continuations, strict=True):
        before, after = encode_pair(tokenizer, context, continuation)
        sequence = (before + after)[-(max_length + 1) :]
        inputs.append(sequence[:-1])
        targets.append(tuple(after[-len(sequence) + 1 :] if len(after) >= len(sequence) else after))
    shared = 0
    while shared < min(map(len, inputs)) and len({ids[shared] for ids in inputs}) == 1:
        shared += 1
    document = Document(inputs[0][:shared], [ids[shared:] for ids in inputs])
    positions = tuple(
        tuple(document.offset(branch, p) for p in range(len(ids) - len(target), len(ids)))
        for branch, (ids, target) in enumerate(zip(inputs, targets, strict=True))
    )
    return Encoded(document, positions, tuple(targets))


def loglikelihoods(
    model: Any, encoded: Sequence[Encoded], batch_tokens: int, progress: Progress = silent
) -> list[list[float]]:
    """Summed log-probability of every choice of every prompt, in the order given.

    Prompts are packed by length, at most `batch_tokens` tokens a forward pass; where memory runs out, the pass is
    split in two.
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].document))
    results: list[list[float]] = [[] for _ in encoded]
    done = 0
    with torch.inference_mode(), packed_attention(model):
        for part in batches([len(encoded[i].document) for i in order], batch_tokens):
            batch = [order[i] for i in part]
            for index, sums in zip(batch, _score_batch(model, [encoded[i] for i in batch]), strict=True):
                results[index] = sums
            done += len(batch)
            progress(done, len(encoded))
    return results


def _score_batch(model: Any, batch: Sequence[Encoded]) -> list[list[float]]:
    try:
        return _score_row(model, batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    half = len(batch) // 2  # outside the handler: the failed pass's tensors are freed by now
    return _score_batch(model, batch[:half]) + _score_batch(model, batch[half:])


def _score_row(model: Any, batch: Sequence[Encoded]) -> list[list[float]]:
    positions: list[int] = []
    targets: list[int] = []
    start = 0
    for item in batch:
        for at, wanted in zip(item.positions, item.targets, strict=True):
            positions += [start + p for p in at]
            targets += wanted
        start += len(item.document)
    logprobs = token_logprobs(model, [item.document for item in batch], positions, targets).tolist()
    sums, taken = [], 0
    for item in batch:
        row = []
        for wanted in item.targets:
            row.append(math.fsum(logprobs[taken : taken + len(wanted)]))
            taken += len(wanted)
        sums.append(row)
    return sums


def token_logprobs(model: Any, documents: Sequence[Document], positions: list[int], targets: list[int]) -> Tensor:
    """Log-probability of `targets[i]` after row position `positions[i]`, float32 [scored]."""
    logits = packed_logits(model, documents, torch.tensor(positions))
    return -cross_entropy(logits.float(), torch.tensor(targets, device=logits.device), reduction="none")


def score_benchmark(
    checkpoint: Path,
    adapter: Path | None,
    prompts_folder: Path,
    benchmark: BenchmarkConfig,
    out: Path,
    execution: ExecutionConfig,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: score one checkpoint on one rendered benchmark; write `predictions.parquet` and `metrics.json`.

    Raises:
        InputError: checkpoint or adapter are broken or do not belong together.
    """
    model, tokenizer = load(checkpoint, adapter, execution.device), load_tokenizer(checkpoint)
    prompts = read_prompts(prompts_folder, "evaluation")
    limit = model.config.max_position_embeddings
    encoded = [encode_prompt(tokenizer, prompt, limit) for prompt in prompts]
    start = time.perf_counter()
    scores = loglikelihoods(model, encoded, execution.batch_tokens, progress)
    seconds = time.perf_counter() - start
    predictions = predict(prompts, scores)
    write_table(out / "predictions.parquet", predictions, PREDICTIONS_SCHEMA)
    (out / "metrics.json").write_text(json.dumps(metrics(benchmark, prompts, predictions), indent=1) + "\n")
    tokens = sum(len(e.document) for e in encoded)
    return {"tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)}


def predict(prompts: Sequence[Prompt], scores: Sequence[Sequence[float]]) -> dict[str, list[Any]]:
    """The columns of `predictions.parquet`: the likeliest choice, by log-likelihood and by that per character."""
    columns: dict[str, list[Any]] = {name: [] for name in PREDICTIONS_SCHEMA.names}
    for prompt, row in zip(prompts, scores, strict=True):
        if not all(map(math.isfinite, row)):
            raise FloatingPointError(f"example {prompt.example}: log-likelihoods {row} are not finite numbers")
        columns["example"].append(prompt.example)
        columns["loglikelihoods"].append(list(row))
        columns["prediction"].append(int(np.argmax(row)))
        columns["prediction_norm"].append(int(np.argmax(np.array(row) / np.array(prompt.choice_lengths))))
        columns["answer"].append(prompt.answer)
    return columns


def read_predictions(folder: Path) -> pa.Table:
    """`predictions.parquet` as a table."""
    return read_table(folder / "predictions.parquet", PREDICTIONS_SCHEMA)


def metrics(benchmark: BenchmarkConfig, prompts: Sequence[Prompt], predictions: dict[str, list[Any]]) -> dict[str, Any]:
    """acc and acc_norm with standard errors (sample deviation ÷ √n), and the floor: what no skill would score."""
    answers = np.array(predictions["answer"])
    result: dict[str, Any] = {
        "benchmark": benchmark.name,
        "metric": headline_metric(benchmark),
        "examples": len(answers),
        "floor": max(
            float(np.mean([1 / len(p.continuations) for p in prompts])),
            max(Counter(answers.tolist()).values()) / len(answers),
        ),
    }
    for name, column in (("acc", "prediction"), ("acc_norm", "prediction_norm")):
        right = np.array(predictions[column]) == answers
        deviation = float(np.std(right, ddof=1)) if len(right) > 1 else 0.0
        result[name] = float(np.mean(right))
        result[f"{name}_stderr"] = deviation / math.sqrt(len(right))
    return result


def read_metrics(folder: Path) -> dict[str, Any]:
    """`metrics.json` of a scored benchmark or a perplexity.

    Raises:
        InputError: the file is missing or not JSON.
    """
    try:
        return dict(json.loads((folder / "metrics.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{folder / 'metrics.json'}: missing or not JSON") from None


def measure_perplexity(
    checkpoint: Path,
    perplexity: PerplexityConfig,
    downloads: str,
    out: Path,
    execution: ExecutionConfig,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: token perplexity of a text in windows that do not overlap; write `metrics.json`.

    Documents are joined by blank lines. The first token of a window has no context and is not scored.

    Raises:
        InputError: the text is shorter than two tokens.
    """
    text = "\n\n".join(load_texts(perplexity, downloads))
    if perplexity.tokens:
        text = text[: perplexity.tokens * 32]  # far more than that many tokens: spare the tokenizer the rest
    model, tokenizer = load(checkpoint, device=execution.device), load_tokenizer(checkpoint)
    if perplexity.window > (limit := model.config.max_position_embeddings):
        raise InputError(f"perplexity.window: got {perplexity.window}; allowed: at most {limit}, the model's context")
    ids = tokenizer.encode(text, add_special_tokens=False)[: perplexity.tokens]
    windows = [ids[i : i + perplexity.window] for i in range(0, len(ids), perplexity.window)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise InputError(f"perplexity.source {perplexity.source}: {len(ids)} tokens; allowed: at least 2")
    losses: list[float] = []
    with torch.inference_mode(), packed_attention(model):
        for done, window in enumerate(windows):
            scored = list(range(len(window) - 1))
            losses += (-token_logprobs(model, [Document(window)], scored, window[1:])).tolist()
            progress(done + 1, len(windows))
    mean = math.fsum(losses) / len(losses)
    result = {"perplexity": math.exp(mean), "tokens": len(losses), "window": perplexity.window}
    (out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    return {"tokens": len(ids)}
