"""Written answers of SmolLM2 to real questions (Natural Questions, closed book) against lm-evaluation-harness's."""

from collections.abc import Callable
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from harness import raw_validation
from helpers import CPU, load_and_render, write_jsonl
from tailored_llama.config import BenchmarkConfig, Work
from tailored_llama.data import read_prompts
from tailored_llama.evaluation import ScoreSettings, read_metrics, score_benchmark
from tailored_llama.evaluation.written import answers_schema
from tailored_llama.models import load_model, load_tokenizer
from tailored_llama.store import read_table

pytestmark = pytest.mark.real
STOP = ["\n", ".", ","]  # of lm-eval's task nq_open


def test_closed_book_answers_equal_the_harness(smollm2: Path, folder: Callable[[str], Path], full: bool) -> None:
    questions = 24 if full else 8  # the answers to some of the eight are right
    rows, data = raw_validation("nq_open", "none"), folder("data")
    benchmark = BenchmarkConfig(
        name="nq",
        train=write_jsonl(data / "train.jsonl", rows[-40:]),
        evaluation=write_jsonl(data / "evaluation.jsonl", rows[4 : 4 + questions]),
        context="Q: {question}?\nA:",
        answer="answer",
        metric="exact_match",
        max_new_tokens=10,
        stop=STOP,
    )
    prompts, out = load_and_render(benchmark, data, num_fewshot=5), folder("scores")
    score_benchmark(smollm2, None, prompts, settings=ScoreSettings.of(benchmark), work=Work(out, CPU))
    lm = HFLM(pretrained=load_model(smollm2), tokenizer=load_tokenizer(smollm2), batch_size=4)
    options = {"until": STOP, "max_gen_toks": 10, "do_sample": False}
    contexts = [prompt.contexts[0] for prompt in read_prompts(prompts, "evaluation")]
    asked = [Instance("generate_until", {}, (context, options), i) for i, context in enumerate(contexts)]
    answers = read_table(out / "answers.parquet", answers_schema("exact_match")).to_pylist()
    assert [row["text"] for row in answers] == [text.strip() for text in lm.generate_until(asked, disable_tqdm=True)]
    assert any(row["f1"] > 0 for row in answers)
    assert read_metrics(out)["exact_match"] == sum(row["exact_match"] for row in answers) / questions
