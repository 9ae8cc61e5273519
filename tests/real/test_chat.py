"""SmolLM2 and Gemma 3 with fewer tokens in llama.cpp's own server: a chat asks what is scored, and answers alike."""

import json
import os
import shutil
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers import CPU, load_and_render, write_jsonl
from llama_server import llama_server
from real_models import dense
from tailored_llama.config import BenchmarkConfig, RunConfig, Work, validate_config
from tailored_llama.data import Chat, Prompt, read_chat, read_prompts
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.models import encode_pair, load_tokenizer, open_gguf, read_structure
from tailored_llama.pipeline import StoreExecutor
from tailored_llama.pipeline.graph import Artifact, stage
from tailored_llama.serving import (
    GgufSettings,
    QuantisedSettings,
    export_gguf,
    score_quantised,
    trim_checkpoint,
    write_chat_template,
)
from tailored_llama.training.tuning import encode_sample

pytestmark = pytest.mark.real
KEPT = {"smollm2-135m-instruct": 16_384, "gemma-3-270m": 32_768}
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""  # as of the models that were tuned to instructions, for texts
LABELS = ("science", "everyday life", "everyday story")  # two of them begin alike


@pytest.fixture(scope="module", params=KEPT)
def trimmed(request: pytest.FixtureRequest, models: StoreExecutor) -> Path:
    return models.open(trimming(f"trim {request.param}", model=dense(request.param), size=KEPT[request.param]))


def trim(model: Path, size: int, settings: None, work: Work) -> None:
    with TemporaryDirectory() as folder:
        copied = shutil.copytree(model, Path(folder), copy_function=os.symlink, dirs_exist_ok=True)
        if "gemma" in read_structure(model).model_type:  # the embedded one has no chat template
            (copied / "chat_template.jinja").write_text(GEMMA)
        trim_checkpoint(copied, ["Text: Kind: Passage: Question: Answer:", *LABELS], size, work.out)


@stage("trimmed", 1, lambda: trim)
def trimming(*, settings: None = None, model: Artifact, size: int) -> None: ...


def labelled(folder: Path, downloads: Path) -> BenchmarkConfig:
    """Texts of three benchmarks; the label says of which."""
    rows: list[dict[str, Any]] = []
    for (name, field), label in zip(
        {"arc_easy": "question", "piqa": "question", "hellaswag": "query"}.items(), LABELS, strict=True
    ):
        for example in islice(load_examples(BenchmarkConfig(name=name), "evaluation", downloads), 12):
            rows.append({"text": example.fields[field], "labels": LABELS, "label": label})
    file = write_jsonl(folder / "rows.jsonl", rows)
    columns = {"context": "Text: {text}\nKind:", "choices": "labels", "answer": "label"}
    return BenchmarkConfig(name="kinds", evaluation=file, metric="acc", **columns)


def message(prompt: Prompt, prefix: str, suffix: str) -> dict[str, str]:
    text = prompt.contexts[0]
    assert text.startswith(prefix)
    assert text.endswith(suffix)
    return {"role": "user", "content": text[len(prefix) : len(text) - len(suffix)]}


def shipped(checkpoint: Path, chat: Chat, folder: Path) -> Any:
    """The tokenizer of a checkpoint as it is shipped."""
    write_chat_template(copied := shutil.copytree(checkpoint, folder / "shipped", copy_function=os.link), chat)
    return load_tokenizer(copied)


def written(folder: Path, downloads: Path, job: str) -> BenchmarkConfig:
    """Rows of a file, two fifths of which are some thousand rows to report on: texts with an object, or with a call."""
    function = {"name": "find", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}
    rows: list[dict[str, Any]] = []
    for example in islice(load_examples(BenchmarkConfig(name="piqa"), "train", downloads), 2800):
        text, found = example.fields["question"], {"what": example.choices[example.answer]}
        call = {"type": "function", "function": {"name": "find", "arguments": json.dumps(found)}}
        answers = [{"role": "user", "content": text}, {"role": "assistant", "tool_calls": [call]}]
        rows.append(
            {"prompt": text, "completion": json.dumps(found)}
            if job == "json"
            else {"messages": answers, "tools": [{"type": "function", "function": function}]}
        )
    (benchmark,) = validate_config({"benchmarks": [write_jsonl(folder / f"{job}.jsonl", rows)]}).benchmarks
    assert benchmark.metric == {"json": "json", "calls": "tool_call"}[job]
    return benchmark


@pytest.mark.parametrize("job", ["boolq", "piqa", "json", "calls"])
def test_a_thousand_rows_are_asked_as_tuned(trimmed: Path, quickstart: RunConfig, job: str, tmp_path: Path) -> None:
    template, prefix, suffix = {
        "boolq": ("harness", "", "?\nAnswer:"),
        "piqa": ("lettered", "Choose the solution that reaches the goal in everyday life.\n\nGoal: ", "\nAnswer:"),
    }.get(job, ("harness", "", ""))
    is_file, downloads = job in ("json", "calls"), quickstart.store.downloads
    benchmark = written(tmp_path, downloads, job) if is_file else BenchmarkConfig(name=job, metric="acc")
    prompts = load_and_render(benchmark, tmp_path, template=template, count=1000, dense=trimmed)
    (out := tmp_path / "out").mkdir()
    export_gguf(trimmed, None, {job: prompts}, settings=GgufSettings("q8_0", job), work=Work(out))
    chat, asked = read_chat(prompts), read_prompts(prompts, "evaluation")
    assert chat is not None
    assert len(asked) == 1000
    tokenizer, chatting = load_tokenizer(trimmed), shipped(trimmed, chat, tmp_path)
    with llama_server(out / f"{job}-q8_0.gguf", 2048) as server:
        for prompt in asked:
            context, answer = encode_pair(tokenizer, prompt.contexts[0], prompt.continuations[0])
            messages = json.loads(prompt.messages) if prompt.messages else [message(prompt, prefix, suffix)]
            if job == "json":
                messages = [{"role": "user", "content": chat.message_in(prompt.contexts[0])}]
            ids = chatting.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            tuned = [*context, *answer]  # a line break at the context's end is with the answer
            assert ids == tuned[: len(ids)]
            assert tokenizer.decode(tuned[len(ids) :]).strip() == prompt.continuations[0].strip()
            assert server.chat_ids(*messages) == ids


def test_a_chat_answers_as_scored(trimmed: Path, quickstart: RunConfig, tmp_path: Path) -> None:
    """Both must read every prompt, one without a cache."""
    benchmark = labelled(tmp_path, quickstart.store.downloads)
    prompts, out, scores = load_and_render(benchmark, tmp_path), tmp_path / "out", tmp_path / "scores"
    for folder in (out, scores):
        folder.mkdir()
    export_gguf(trimmed, None, {"kinds": prompts}, settings=GgufSettings("q8_0", "kinds"), work=Work(out))
    chat, asked = read_chat(prompts), read_prompts(prompts, "evaluation")
    assert chat is not None
    tokenizer, chatting, said = load_tokenizer(trimmed), shipped(trimmed, chat, tmp_path), []
    with llama_server(out / "kinds-q8_0.gguf", 2048) as server:
        for prompt in asked:
            ids = encode_pair(tokenizer, prompt.contexts[0], prompt.continuations[0])[0]
            text = message(prompt, "Text: ", "\nKind:")
            assert chatting.apply_chat_template([text], add_generation_prompt=True, return_dict=False) == ids
            assert server.chat_ids(text) == ids
            said.append(server.chat({"messages": [text], "temperature": 0}))
    score_quantised(trimmed, out, prompts, settings=QuantisedSettings.of(benchmark, "q8_0"), work=Work(scores, CPU))
    ranked = np.array(pq.read_table(scores / "predictions.parquet")["loglikelihoods"].to_pylist()).argmax(1)
    best = [prompt.continuations[choice] for prompt, choice in zip(asked, ranked, strict=True)]
    assert sum(map(str.__eq__, said, best)) >= 0.85 * len(best)  # a choice word by word is not quite a ranking


@pytest.mark.parametrize("system", ['Answer in one word, as "they" say it.', ""], ids=["system", "no system"])
def test_messages_of_several_turns_are_read_as_tuned(
    trimmed: Path, quickstart: RunConfig, system: str, tmp_path: Path
) -> None:
    drawn = islice(load_examples(BenchmarkConfig(name="piqa"), "evaluation", quickstart.store.downloads), 750)
    texts = [(example.fields["question"], example.choices[example.answer]) for example in drawn]
    told, asked = [{"role": "system", "content": system}] * bool(system), dict[int, list[dict[str, str]]]()
    for i in range(250):
        turns = texts[3 * i : 3 * i + 1 + i % 3]
        pairs = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in turns]
        asked[i] = [*told, *(message for pair in pairs for message in pair)]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages} for messages in asked.values()])
    (benchmark,) = validate_config({"benchmarks": [file]}).benchmarks
    prompts, out = load_and_render(benchmark, tmp_path, dense=trimmed), tmp_path / "out"
    out.mkdir()
    export_gguf(trimmed, None, {"rows": prompts}, settings=GgufSettings("q8_0", "rows"), work=Work(out))
    chat = read_chat(prompts)
    assert chat is not None
    tokenizer, chatting = load_tokenizer(trimmed), shipped(trimmed, chat, tmp_path)
    file_end = open_gguf(out / "rows-q8_0.gguf", "").fields["tokenizer.ggml.eos_token_id"].contents()
    assert file_end == chatting.eos_token_id == chatting.convert_tokens_to_ids(chat.end)
    with llama_server(out / "rows-q8_0.gguf", 2048) as server:
        compared = read_prompts(prompts, "evaluation")
        for prompt in compared:
            *messages, _ = asked[prompt.example]
            tuned = encode_sample(tokenizer, 8192, None, prompt).encoded
            ids = list(tuned.document.prefix[: tuned.positions[0][0] + 1])
            assert tuned.targets[0][-1] == file_end
            for request in (messages, messages[len(told) :]):
                assert chatting.apply_chat_template(request, add_generation_prompt=True, return_dict=False) == ids
                assert server.chat_ids(*request) == ids
    assert len(compared) >= 90
