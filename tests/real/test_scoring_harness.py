"""Scores against lm-evaluation-harness 0.4.13 on SmolLM2 and real documents, float32.

Its own HFLM computes the log-likelihoods of the prompts that `render` writes (which another test holds equal to its own
stock tasks): every one within 2e-3, every prediction the same, on 24 evenly spaced documents of each benchmark.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tailored_llama.benchmarks import SEVEN, load_examples
from tailored_llama.config import BenchmarkConfig, StoreConfig
from tailored_llama.models import load, load_tokenizer
from tailored_llama.prompts import render, select_evaluation
from tailored_llama.scoring import encode_prompt, loglikelihoods, predict

pytestmark = pytest.mark.real
DOCUMENTS = 24


@pytest.mark.parametrize("name", SEVEN)
@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_loglikelihoods_equal_the_harness(name: str, kind: str, smollm2: Path, pruned_smollm2: Path) -> None:
    checkpoint = smollm2 if kind == "dense" else pruned_smollm2
    model, tokenizer = load(checkpoint), load_tokenizer(checkpoint)
    benchmark = BenchmarkConfig(name=name)
    examples = select_evaluation(load_examples(benchmark, "evaluation", StoreConfig().downloads), DOCUMENTS)
    prompts = [render(benchmark, "harness", example) for example in examples]
    ours = loglikelihoods(model, [encode_prompt(tokenizer, p, 8192) for p in prompts], 2048)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    pairs = [pair for p in prompts for pair in zip(p.contexts, p.continuations, strict=True)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    flat = iter([value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)])
    theirs = [[next(flat) for _ in p.continuations] for p in prompts]
    assert len(ours) == DOCUMENTS
    for row, wanted in zip(ours, theirs, strict=True):
        assert row == pytest.approx(wanted, abs=2e-3)
    mine, other = predict(prompts, ours), predict(prompts, theirs)
    for column in ("prediction", "prediction_norm"):
        assert np.array_equal(mine[column], other[column])
