"""Scoring: the log-likelihood of every choice, and accuracies as lm-evaluation-harness defines them."""

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tailored_llama.config import WRITTEN, Work
from tailored_llama.data import UNLABELLED, Prompt, read_prompts, score_prompts, shared_header
from tailored_llama.evaluation.generation import generate
from tailored_llama.evaluation.scores import PREDICTIONS_SCHEMA, hits, metrics
from tailored_llama.evaluation.settings import ScoreSettings
from tailored_llama.evaluation.written import METRICS, answers_schema, judge, written_floor
from tailored_llama.models import load_tokenizer, open_model, token_budget, with_end
from tailored_llama.store import write_table


def score_benchmark(
    checkpoint: Path, adapter: Path | None, prompts: Path, *, settings: ScoreSettings, work: Work
) -> dict[str, Any]:
    """Stage: score one checkpoint on one rendered benchmark; write `metrics.json` and the answers behind it.

    Choices go to `predictions.parquet`, written answers to `answers.parquet`. An adapter is merged into the
    weights.

    Raises:
        InputError: the checkpoint or the adapter is broken, or the two do not belong together; or streaming is demanded
            for written answers or an adapter, which need the whole model.
    """
    is_text = settings.metric in WRITTEN
    whole = "written answers" if is_text else None
    model = open_model(checkpoint, work.execution, work.out, adapter, whole)
    tokenizer, rendered = load_tokenizer(checkpoint), read_prompts(prompts, settings.split)
    start = time.perf_counter()
    answer = _write_answers if is_text else _rank_choices
    result, measured = answer(model, tokenizer, rendered, settings, work)
    facts = facts_of(settings, rendered, "transformers", is_text or "written" in result)
    (work.out / "metrics.json").write_text(json.dumps(facts | result, indent=1) + "\n")
    rate = {f"{name}_per_second": round(n / (time.perf_counter() - start), 1) for name, n in measured.items()}
    return measured | rate


def facts_of(
    settings: ScoreSettings, prompts: Sequence[Prompt], runtime: str, is_written: bool, allowed: Any = None
) -> dict[str, Any]:
    """What `metrics.json` says beside the metrics: the benchmark, and how its rows were asked (`check_alike`).

    `allowed` is what a grammar or a schema allows as an answer.
    """
    limits = asdict(settings.written) if settings.written else {}
    asking = {"runtime": runtime, "answers": "written" if is_written else "ranked", "allowed": allowed} | limits
    return {"benchmark": settings.benchmark, "metric": settings.metric, "examples": len(prompts), "asking": asking}


def _rank_choices(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], settings: ScoreSettings, work: Work
) -> tuple[dict[str, Any], dict[str, int]]:
    """The metrics of the likeliest choices, or of those that are written, and the number of tokens that were read."""
    budget = token_budget(work.execution.batch_tokens, model)
    writes = settings.written is not None and prompts[0].is_ended
    encoded, sums, written = score_prompts(model, tokenizer, prompts, writes, budget, work.progress)
    whole = [item for item in encoded if not item.truncated]  # their common start is encoded once
    tokens = sum(len(item.document) for item in encoded) - len(shared_header(whole)) * max(0, len(whole) - 1)
    result: dict[str, Any] = write_choices(prompts, sums, written, work.out)
    return result | ({"written": True} if writes else {}), {"tokens": tokens}


def write_choices(
    prompts: Sequence[Prompt], scores: Sequence[Sequence[float]], written: Sequence[int], out: Path
) -> dict[str, float]:
    """Write `predictions.parquet`, whose columns are those of `predict`, and return its metrics with their floor."""
    columns = predict(prompts, scores, written)
    write_table(out / "predictions.parquet", columns, PREDICTIONS_SCHEMA)
    return {"floor": choice_floor(prompts)} | metrics(hits(columns))


def _write_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], settings: ScoreSettings, work: Work
) -> tuple[dict[str, Any], dict[str, int]]:
    """The metrics of what the model writes, and the number of examples."""
    written = settings.written
    assert written
    contexts = [prompt.contexts[0] for prompt in prompts]
    if end := prompts[0].end:
        ends = model.generation_config
        ends.eos_token_id = with_end(ends.eos_token_id, tokenizer.convert_tokens_to_ids(end))
    texts = generate(model, tokenizer, contexts, written, work.execution.batch_tokens, work.progress)
    return write_texts(prompts, texts, settings, work.out), {"examples": len(prompts)}


def write_texts(
    prompts: Sequence[Prompt], texts: Sequence[str], settings: ScoreSettings, out: Path
) -> dict[str, float]:
    """Write `answers.parquet` of what was written, and return its metrics with the floor of the headline metric."""
    metric, ignore = settings.metric, settings.written.ignore if settings.written else None
    columns = judge(prompts, texts, metric, ignore)
    write_table(out / "answers.parquet", columns, answers_schema(metric))
    measured = {name: columns[name] for name in METRICS[metric](None).values}
    return {"floor": written_floor(prompts, metric, ignore)} | metrics(measured)


def predict(
    prompts: Sequence[Prompt], scores: Sequence[Sequence[float]], written: Sequence[int] = ()
) -> dict[str, list[Any]]:
    """The columns of `predictions.parquet`: the likeliest choice, by log-likelihood in total and per character.

    If choices were `written`, it is these; -1 is none of them.
    """
    for prompt, row in zip(prompts, scores, strict=True):
        if not all(map(math.isfinite, row)):
            raise FloatingPointError(f"example {prompt.example}: log-likelihoods {row} are not finite numbers")
    per_character = (np.divide(row, prompt.choice_lengths) for row, prompt in zip(scores, prompts, strict=True))
    return {
        "example": [prompt.example for prompt in prompts],
        "loglikelihoods": [list(row) for row in scores],
        "prediction": list(written) or [int(np.argmax(row)) for row in scores],
        "prediction_norm": list(written) or [int(np.argmax(row)) for row in per_character],
        "answer": [prompt.answer for prompt in prompts],
    }


def choice_floor(prompts: Sequence[Prompt]) -> float:
    """Accuracy without skill: the larger of 1 ÷ number of choices and the share of the most common answer."""
    known = Counter(prompt.answer for prompt in prompts if prompt.answer != UNLABELLED)
    majority = max(known.values(), default=0) / max(sum(known.values()), 1)
    return max(float(np.mean([1 / len(prompt.continuations) for prompt in prompts])), majority)
