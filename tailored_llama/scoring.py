"""Scoring: the log-likelihood of every choice, and accuracies as lm-evaluation-harness defines them."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tailored_llama import generation
from tailored_llama.artifacts import read_table, write_table
from tailored_llama.benchmarks import headline_metric
from tailored_llama.config import BenchmarkConfig, ExecutionConfig
from tailored_llama.errors import InputError
from tailored_llama.models import load, load_tokenizer
from tailored_llama.own import WRITTEN, is_written, max_new_tokens, stop_strings
from tailored_llama.packing import (
    Document,
    Header,
    encode_header,
    packed_attention,
    packed_logprobs,
    token_budget,
    within_memory,
)
from tailored_llama.progress import Progress, silent
from tailored_llama.prompts import Prompt, PromptSplit, read_prompts
from tailored_llama.soft_prompts import context_length, learnt_header
from tailored_llama.statistics import Answers
from tailored_llama.tokens import encode_pair

WORTH_A_PASS = 64  # tokens; with fewer to spare, a header's own pass costs more than it saves

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
    truncated: bool = False  # whether a choice lost the start of its context

    def after(self, header: int) -> Encoded:
        """The same without its first `header` tokens, which are encoded elsewhere."""
        document = Document(self.document.prefix[header:], self.document.branches)
        positions = tuple(tuple(p - header for p in choice) for choice in self.positions)
        return Encoded(document, positions, self.targets, self.truncated)


def encode_prompt(tokenizer: Any, prompt: Prompt, max_length: int) -> Encoded:
    """Tokenise every choice of a prompt and find the prefix they share; long contexts lose their start.

    Raises:
        InputError: a continuation has no token of its own, or more than the model's context holds.
    """
    inputs: list[list[int]] = []
    targets: list[tuple[int, ...]] = []
    truncated = False
    for context, continuation in zip(prompt.contexts, prompt.continuations, strict=True):
        before, after = encode_pair(tokenizer, context, continuation)
        if not after:
            raise InputError(
                f"example {prompt.example}: got the continuation {continuation!r}, which the tokenizer joins to its "
                "context; allowed: a continuation with a token of its own"
            )
        if len(after) > max_length:
            raise InputError(
                f"example {prompt.example}: got a continuation of {len(after)} tokens; allowed: at most {max_length}, "
                "the model's context"
            )
        sequence = (before + after)[-(max_length + 1) :]
        truncated |= len(sequence) < len(before) + len(after)
        inputs.append(sequence[:-1])
        targets.append(tuple(after))
    shared = len(common_prefix(inputs))
    document = Document(inputs[0][:shared], [ids[shared:] for ids in inputs])
    positions = tuple(
        tuple(document.offset(branch, p) for p in range(len(ids) - len(target), len(ids)))
        for branch, (ids, target) in enumerate(zip(inputs, targets, strict=True))
    )
    return Encoded(document, positions, tuple(targets), truncated)


def encode_answer(tokenizer: Any, prompt: Prompt, max_length: int) -> Encoded:
    """The right choice of a prompt alone, as `encode_prompt` would tokenise it."""
    right = prompt.answer
    alone = Prompt(prompt.example, (prompt.contexts[right],), (prompt.continuations[right],), 0, (1,))
    return encode_prompt(tokenizer, alone, max_length)


def common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """The longest start that all sequences share."""
    low, high = min(sequences), max(sequences)  # what the first and the last in order share, all share
    shared = next((i for i, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))
    return low[:shared]


def shared_header(encoded: Sequence[Encoded]) -> list[int]:
    """The tokens that all prompts start with, such as the solved examples before them; none that is scored on.

    Empty where encoding them once, in a pass of their own, would spare too little.
    """
    if len(encoded) < 2:
        return []
    shared = common_prefix([list(item.document.prefix) for item in encoded])
    shared = shared[: min(min(choice[0] for choice in item.positions) for item in encoded)]
    return shared if len(shared) * (len(encoded) - 1) >= WORTH_A_PASS else []


def loglikelihoods(
    model: Any, encoded: Sequence[Encoded], batch_tokens: int, progress: Progress = silent
) -> list[list[float]]:
    """Summed log-probability of every choice of every prompt, in the order given.

    What all prompts start with is encoded once. Prompts are packed by length, at most `batch_tokens` tokens a forward
    pass; where memory runs out, with half as many from then on.
    """
    results: list[list[float]] = [[] for _ in encoded]
    whole = [i for i, item in enumerate(encoded) if not item.truncated]
    cut = [i for i, item in enumerate(encoded) if item.truncated]  # they start anywhere: no header in common
    done = 0
    with torch.inference_mode(), packed_attention(model):
        for members in filter(None, (whole, cut)):
            shared = shared_header([encoded[i] for i in members])
            header = encode_header(model, shared, batch_tokens, learnt_header(model))
            group = [encoded[i].after(len(shared)) for i in members]
            lengths = [len(item.document) for item in group]
            for batch, rows in within_memory(lengths, batch_tokens, partial(_score_row, model, header, group)):
                for i, row in zip(batch, rows, strict=True):
                    results[members[i]] = row
                done += len(batch)
                progress(done, len(encoded))
    return results


def _score_row(model: Any, header: Header, encoded: Sequence[Encoded], batch: Sequence[int]) -> list[list[float]]:
    """One forward pass: the sums of every choice of some of the prompts."""
    positions: list[int] = []
    targets: list[int] = []
    start = 0
    for item in (items := [encoded[i] for i in batch]):
        for at, wanted in zip(item.positions, item.targets, strict=True):
            positions += [start + p for p in at]
            targets += wanted
        start += len(item.document)
    logprobs = iter(packed_logprobs(model, [item.document for item in items], positions, targets, header).tolist())
    return [[math.fsum(islice(logprobs, len(wanted))) for wanted in item.targets] for item in items]


def score_benchmark(
    checkpoint: Path,
    adapter: Path | None,
    prompts_folder: Path,
    benchmark: BenchmarkConfig,
    out: Path,
    execution: ExecutionConfig,
    progress: Progress = silent,
    split: PromptSplit = "evaluation",
) -> dict[str, Any]:
    """Stage: score one checkpoint on one rendered benchmark; write `metrics.json` and what it was taken from.

    That is `predictions.parquet` where the answer is one of several choices, `answers.parquet` where the model writes
    it; `metrics.json` then also has the perplexity of the accepted answers (each example's first), per token.

    Raises:
        InputError: checkpoint or adapter are broken or do not belong together.
    """
    model, tokenizer = load(checkpoint, adapter, execution.device), load_tokenizer(checkpoint)
    prompts, budget = read_prompts(prompts_folder, split), token_budget(execution.batch_tokens, model)
    start, limit = time.perf_counter(), context_length(model)
    if is_written(benchmark):
        texts = generation.generate(
            model,
            tokenizer,
            [prompt.contexts[0] for prompt in prompts],
            max_new_tokens(benchmark),
            stop_strings(benchmark),
            budget,
            progress,
        )
        encoded = [encode_answer(tokenizer, prompt, limit) for prompt in prompts]
        columns = generation.judge(prompts, texts)
        columns["loglikelihood"] = [row[0] for row in loglikelihoods(model, encoded, budget)]
        columns["tokens"] = [len(item.targets[0]) for item in encoded]
        write_table(out / "answers.parquet", columns, generation.ANSWERS_SCHEMA)
        values, least = {name: columns[name] for name in WRITTEN}, generation.floor(prompts, headline_metric(benchmark))
        perplexity = {"answer_perplexity": generation.answer_perplexity(columns["loglikelihood"], columns["tokens"])}
        measured: dict[str, Any] = {"examples": len(prompts)}
    else:
        encoded = [encode_prompt(tokenizer, prompt, limit) for prompt in prompts]
        columns = predict(prompts, loglikelihoods(model, encoded, budget, progress))
        write_table(out / "predictions.parquet", columns, PREDICTIONS_SCHEMA)
        values, least, perplexity = hits(columns), floor(prompts), {}
        measured = {"tokens": sum(len(item.document) for item in encoded) - _spared(encoded)}
    result = {"benchmark": benchmark.name, "metric": headline_metric(benchmark), "examples": len(prompts)}
    result |= {"floor": least} | metrics(values) | perplexity
    (out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    rate = {f"{name}_per_second": round(n / (time.perf_counter() - start), 1) for name, n in measured.items()}
    return measured | rate


def _spared(encoded: Sequence[Encoded]) -> int:
    """Tokens of prompts that were not computed again, as what they start with is encoded once."""
    whole = [item for item in encoded if not item.truncated]
    return len(shared_header(whole)) * max(0, len(whole) - 1)


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


def read_answers(folder: Path, metric: str) -> Answers:
    """What a scored model answered, and its value in a metric."""
    if metric in WRITTEN:
        table = read_table(folder / "answers.parquet", generation.ANSWERS_SCHEMA)
        wanted = np.array(["\n".join(accepted) for accepted in table["accepted"].to_pylist()])
        return Answers(table["example"].to_numpy(), wanted, table[metric].to_numpy())
    table = read_table(folder / "predictions.parquet", PREDICTIONS_SCHEMA)
    found = hits({name: table[name].to_pylist() for name in ("prediction", "prediction_norm", "answer")})
    return Answers(table["example"].to_numpy(), table["answer"].to_numpy(), np.array(found[metric]))


def hits(predictions: dict[str, list[Any]]) -> dict[str, list[float]]:
    """acc and acc_norm of every example: 1 where the right choice is the likeliest (per character), else 0."""
    pairs = (("acc", "prediction"), ("acc_norm", "prediction_norm"))
    return {
        name: [float(p == a) for p, a in zip(predictions[column], predictions["answer"], strict=True)]
        for name, column in pairs
    }


def floor(prompts: Sequence[Prompt]) -> float:
    """What no skill scores: the larger of one in the number of choices and the share of the commonest answer."""
    majority = max(Counter(prompt.answer for prompt in prompts).values()) / len(prompts)
    return max(float(np.mean([1 / len(prompt.continuations) for prompt in prompts])), majority)


def metrics(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of every metric over the examples, with its standard error (sample deviation ÷ √n)."""
    result: dict[str, float] = {}
    for name, found in values.items():
        result[name] = float(np.mean(found))
        deviation = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
        result[f"{name}_stderr"] = deviation / math.sqrt(len(found))
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
