"""Scoring: the log-likelihood of every choice, and accuracies as lm-evaluation-harness defines them."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tailored_llama.config import WRITTEN, BenchmarkConfig, ExecutionConfig, is_written, max_new_tokens, stop_strings
from tailored_llama.data import (
    Encoded,
    Prompt,
    PromptSplit,
    encode_answer,
    encode_prompt,
    headline_metric,
    loglikelihoods,
    read_prompts,
    shared_header,
)
from tailored_llama.evaluation import generation
from tailored_llama.evaluation.scores import ANSWERS_SCHEMA, PREDICTIONS_SCHEMA, hits, metrics
from tailored_llama.models import context_length, load_tokenizer, open_model, token_budget
from tailored_llama.progress import Progress, silent
from tailored_llama.store import write_table

STAGE, VERSION = "scores", 2


def key_fields(benchmark: BenchmarkConfig, split: PromptSplit = "evaluation", merged: bool = False) -> dict[str, Any]:
    """What scores depend on, beside the checkpoint, the adapter and the prompts.

    Args:
        benchmark: the benchmark.
        split: the scored split.
        merged: whether there is an adapter that merges into the weights. Earlier versions scored it attached.
    """
    fields: dict[str, Any] = {"benchmark": benchmark.name, "metric": headline_metric(benchmark)}
    if merged:
        fields["adapter"] = "merged"
    if is_written(benchmark):
        fields |= {"max_new_tokens": max_new_tokens(benchmark), "stop": stop_strings(benchmark)}
        fields["answers"] = "with their perplexity"
        if benchmark.ignore is not None:
            fields["ignore"] = benchmark.ignore
    return fields | ({"split": split} if split != "evaluation" else {})


def score_benchmark(
    checkpoint: Path,
    adapter: Path | None,
    prompts: Path,
    *,
    benchmark: BenchmarkConfig,
    out: Path,
    execution: ExecutionConfig,
    split: PromptSplit = "evaluation",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: score one checkpoint on one rendered benchmark; write `metrics.json` and the answers behind it.

    Multiple-choice answers go to `predictions.parquet`, written ones to `answers.parquet`. For written answers,
    `metrics.json` also has the per-token perplexity of each example's first accepted answer.

    Raises:
        InputError: the checkpoint or the adapter is broken, or the two do not belong together; or streaming is demanded
            for written answers or an adapter, which need the whole model.
    """
    whole = "written answers" if is_written(benchmark) else None
    model, tokenizer = open_model(checkpoint, execution, out, adapter, whole), load_tokenizer(checkpoint)
    rendered, budget = read_prompts(prompts, split), token_budget(execution.batch_tokens, model)
    start, limit = time.perf_counter(), context_length(model)
    if is_written(benchmark):
        texts = generation.generate(
            model,
            tokenizer,
            [prompt.contexts[0] for prompt in rendered],
            generation.Until(max_new_tokens(benchmark), stop_strings(benchmark)),
            budget,
            progress,
        )
        encoded = [encode_answer(tokenizer, prompt, limit) for prompt in rendered]
        columns = generation.judge(rendered, texts, benchmark.ignore)
        columns["loglikelihood"] = [row[0] for row in loglikelihoods(model, encoded, budget)]
        columns["tokens"] = [len(item.targets[0]) for item in encoded]
        write_table(out / "answers.parquet", columns, ANSWERS_SCHEMA)
        values = {name: columns[name] for name in WRITTEN}
        floor = generation.written_floor(rendered, headline_metric(benchmark), benchmark.ignore)
        perplexity = {"answer_perplexity": generation.answer_perplexity(columns["loglikelihood"], columns["tokens"])}
        measured: dict[str, Any] = {"examples": len(rendered)}
    else:
        encoded = [encode_prompt(tokenizer, prompt, limit) for prompt in rendered]
        columns = predict(rendered, loglikelihoods(model, encoded, budget, progress))
        write_table(out / "predictions.parquet", columns, PREDICTIONS_SCHEMA)
        values, floor, perplexity = hits(columns), choice_floor(rendered), {}
        measured = {"tokens": sum(len(item.document) for item in encoded) - _shared_tokens(encoded)}
    result = {"benchmark": benchmark.name, "metric": headline_metric(benchmark), "examples": len(rendered)}
    result |= {"floor": floor} | metrics(values) | perplexity
    (out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    rate = {f"{name}_per_second": round(n / (time.perf_counter() - start), 1) for name, n in measured.items()}
    return measured | rate


def _shared_tokens(encoded: Sequence[Encoded]) -> int:
    """Prompt tokens that are not computed again, because the common start is encoded once."""
    whole = [item for item in encoded if not item.truncated]
    return len(shared_header(whole)) * max(0, len(whole) - 1)


def predict(prompts: Sequence[Prompt], scores: Sequence[Sequence[float]]) -> dict[str, list[Any]]:
    """The columns of `predictions.parquet`: the likeliest choice, by log-likelihood in total and per character."""
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


def choice_floor(prompts: Sequence[Prompt]) -> float:
    """Accuracy without skill: the larger of 1 ÷ number of choices and the share of the most common answer."""
    majority = max(Counter(prompt.answer for prompt in prompts).values()) / len(prompts)
    return max(float(np.mean([1 / len(prompt.continuations) for prompt in prompts])), majority)
