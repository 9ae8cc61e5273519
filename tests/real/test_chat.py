"""SmolLM2 and Gemma 3 with fewer tokens in llama.cpp's own server: a chat asks what is scored, and answers alike."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers import CPU, load_and_render, write_jsonl
from llama_server import llama_server
from tailored_llama.config import BenchmarkConfig, ModelConfig, RunConfig, Work
from tailored_llama.data import Prompt, read_chat, read_prompts
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.models import DenseSettings, encode_pair, load_tokenizer, prepare_dense
from tailored_llama.serving import (
    GgufSettings,
    QuantisedSettings,
    export_gguf,
    score_quantised,
    trim_checkpoint,
    write_chat_template,
)

pytestmark = pytest.mark.real
KEPT = {"smollm2-135m-instruct": 16_384, "gemma-3-270m": 32_768}
LABELS = ("science", "everyday life", "everyday story")  # two of them begin alike


@pytest.fixture(scope="module", params=KEPT)
def trimmed(request: pytest.FixtureRequest, quickstart: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense, out = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("trimmed")
    settings = DenseSettings.of(ModelConfig(source=request.param, dtype="float32"))
    prepare_dense(settings=settings, work=Work(dense, downloads=quickstart.store.downloads))
    trim_checkpoint(dense, ["Text: Kind: Passage: Question: Answer:", *LABELS], KEPT[request.param], out)
    return out


def labelled(folder: Path, downloads: Path) -> BenchmarkConfig:
    """Texts of three benchmarks; the label says of which."""
    rows: list[dict[str, Any]] = []
    for (name, field), label in zip(
        {"arc_easy": "question", "piqa": "question", "hellaswag": "query"}.items(), LABELS, strict=True
    ):
        for example in islice(load_examples(BenchmarkConfig(name=name), "evaluation", downloads), 30):
            rows.append({"text": example.fields[field], "labels": LABELS, "label": label})
    file = write_jsonl(folder / "rows.jsonl", rows)
    columns = {"context": "Text: {text}\nKind:", "choices": "labels", "answer": "label"}
    return BenchmarkConfig(name="kinds", evaluation=file, metric="acc", **columns)


def message(prompt: Prompt, prefix: str, suffix: str) -> dict[str, str]:
    text = prompt.contexts[0]
    assert text.startswith(prefix)
    assert text.endswith(suffix)
    return {"role": "user", "content": text[len(prefix) : len(text) - len(suffix)]}


@pytest.mark.parametrize("job", ["kinds", "boolq", "piqa"])
def test_a_chat_asks_and_answers_as_scored(trimmed: Path, quickstart: RunConfig, job: str, tmp_path: Path) -> None:
    """Ids are compared for all jobs, and answers for one: both must read every prompt, one without a cache."""
    benchmark = (
        BenchmarkConfig(name=job, metric="acc") if job != "kinds" else labelled(tmp_path, quickstart.store.downloads)
    )
    template, prefix, suffix = {
        "kinds": ("harness", "Text: ", "\nKind:"),
        "boolq": ("harness", "", "?\nAnswer:"),
        "piqa": ("lettered", "Choose the solution that reaches the goal in everyday life.\n\nGoal: ", "\nAnswer:"),
    }[job]
    prompts = load_and_render(benchmark, tmp_path, template=template, limit=100)
    out, scores = tmp_path / "out", tmp_path / "scores"
    for folder in (out, scores):
        folder.mkdir()
    export_gguf(trimmed, None, {job: prompts}, settings=GgufSettings("q8_0", job), work=Work(out))
    chat = read_chat({job: prompts})
    assert chat is not None
    tokenizer = load_tokenizer(trimmed)
    write_chat_template(trimmed, chat)
    chatting, said = load_tokenizer(trimmed), []
    with llama_server(out / f"{job}-q8_0.gguf", 2048) as server:
        asked = read_prompts(prompts, "evaluation")
        for prompt in asked:
            ids = encode_pair(tokenizer, prompt.contexts[0], prompt.continuations[0])[0]
            text = message(prompt, prefix, suffix)
            assert chatting.apply_chat_template([text], add_generation_prompt=True, return_dict=False) == ids
            assert server.chat_ids(text) == ids
            if job == "kinds":
                said.append(server.chat({"messages": [text], "temperature": 0}))
    if said:
        settings = QuantisedSettings.of(benchmark, "q8_0")
        score_quantised(trimmed, out, prompts, settings=settings, work=Work(scores, CPU))
        ranked = np.array(pq.read_table(scores / "predictions.parquet")["loglikelihoods"].to_pylist()).argmax(1)
        best = [prompt.continuations[choice] for prompt, choice in zip(asked, ranked, strict=True)]
        assert sum(map(str.__eq__, said, best)) >= 0.85 * len(best)  # a choice word by word is not quite a ranking
