"""SmolLM2, pruned, in a vLLM server: the same tokens and log-probabilities, two adapters in one batch.

By hand, with `make test-vllm`: vLLM lives in a virtual environment of its own.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from itertools import islice, product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from compositions import compose
from helpers import CPU, load_and_render, save_worded_llama, tune, write_jsonl
from services import children, free_port, until
from tailored_llama.config import BenchmarkConfig, RunConfig, SmallestConfig, build_config
from tailored_llama.data import read_chat, read_prompts
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.evaluation import ScoreSettings, read_answer
from tailored_llama.models import encode_pair, family_of, load_model, load_tokenizer, read_structure
from tailored_llama.pipeline import FolderExecutor, read_certificate, verify_server
from tailored_llama.pipeline.proven import certified_rows
from tailored_llama.pruning.surgery import prune_checkpoint
from tailored_llama.pruning.vocabulary import VocabularyPlan
from tailored_llama.serving import ChatServer, requests_of

pytestmark = pytest.mark.vllm
PROMPTS = ("The capital of France is", "Question: What do plants make from sunlight?\nAnswer:")
NEW_TOKENS = 24
SCORED = ScoreSettings("rows", "acc")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}
Ask = partial[dict[str, Any]]  # of `post`


@pytest.fixture(scope="session")
def vllm(request: pytest.FixtureRequest) -> str:
    """The Python that vLLM is installed for."""
    return str(Path(request.config.getoption("--vllm")).absolute())


@pytest.fixture(scope="session")
def adapters(pruned_smollm2: Path, quickstart: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters, each so large that nobody could miss it."""
    made = {}
    for name in ("arc_easy", "piqa"):
        data, made[name] = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp(name)
        prompts = load_and_render(BenchmarkConfig(name=name), data, split="train", shots=8)
        tuning = quickstart.tuning.model_copy(update={"epochs": 4, "learning_rate": 5e-3})
        tune(pruned_smollm2, prompts, tuning, made[name])
    return made


@contextmanager
def served(vllm: str, checkpoint: Path, log: Path, *arguments: str, name: str = "base") -> Iterator[Ask]:
    """What `vllm serve` runs, in float32. That command itself does not start in the package vllm-cpu 0.32.0."""
    port = free_port()
    command = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--served-model-name", name, *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512"]
    command += ["--enforce-eager"]  # without it, vLLM compiles for minutes
    with children() as spawn:
        process = spawn(command, log, ENVIRONMENT)

        def ready() -> bool:
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
            except httpx.HTTPError:
                return False

        until(ready, 1200, "vLLM's start", pause=0.5)  # beside other work, it takes many minutes
        yield partial(post, f"http://127.0.0.1:{port}")


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{url}{path}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def complete(ask: Ask, model: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and the log-probability of each."""
    asked: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
    choice = ask("/v1/completions", asked | {"logprobs": 1, "return_token_ids": True, "ignore_eos": True})["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def by_transformers(checkpoint: Path, adapter: Path | None, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The same."""
    model, ids = load_model(checkpoint, adapter), torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        logprobs = model(ids[:, :-1]).logits[0, len(prompt) - 1 :].log_softmax(-1)
    new = ids[0, len(prompt) :]
    return new.tolist(), logprobs.gather(1, new[:, None])[:, 0].tolist()


def test_a_pruned_model_says_the_same(pruned_smollm2: Path, vllm: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pruned_smollm2)
    with served(vllm, pruned_smollm2, tmp_path / "vllm.log") as ask:
        for prompt in (tokenizer(text)["input_ids"] for text in PROMPTS):
            tokens, logprobs = by_transformers(pruned_smollm2, None, prompt)
            said = complete(ask, "base", prompt)
            assert said[0] == tokens
            assert said[1] == pytest.approx(logprobs, abs=1e-3)


WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 96, "pad_token_id": 0, "max_position_embeddings": 512}
LEVELS: dict[str, dict[str, Any]] = {
    "olmo2": {"tie_word_embeddings": False},  # tokens and channels
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},  # tokens
}


@pytest.mark.parametrize("architecture", LEVELS)
def test_a_pruned_model_of_another_level_says_the_same(vllm: str, architecture: str, tmp_path: Path) -> None:
    dense = save_worded_llama(tmp_path / "dense", architecture=architecture, **WIDE, **LEVELS[architecture])
    (pruned := tmp_path / "pruned").mkdir()
    structure, kept = read_structure(dense), VocabularyPlan(tuple(range(448)), np.ones(704))
    channels = torch.arange(structure.layer.channels) % 3 > 0  # a third leaves
    stays, layer = {}, structure.layer
    if family_of(architecture).level == "channels":
        layer = replace(layer, channels=int(channels.sum()))
        for number, name in product(range(structure.depth), ("gate_proj", "up_proj", "down_proj")):
            stays[f"model.layers.{number}.mlp.{name}.weight"] = int(name == "down_proj"), channels.numpy()
    prune_checkpoint(dense, layer, stays, pruned, tokens=kept)
    prompt = [5, 9, 200, 31, 77, 14]
    with served(vllm, pruned, tmp_path / "vllm.log") as ask:
        tokens, logprobs = by_transformers(pruned, None, prompt)
        said = complete(ask, "base", prompt)
        assert said[0] == tokens
        assert said[1] == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("form", ["labels", "messages"])
def test_a_proven_checkpoint_is_asked_in_a_chat_as_it_was_tuned_and_certified(
    quickstart: RunConfig, vllm: str, form: str, tmp_path: Path
) -> None:
    drawn = list(islice(load_examples(BenchmarkConfig(name="piqa"), "evaluation", quickstart.store.downloads), 150))
    rows: list[dict[str, Any]] = [{"text": e.fields["question"], "label": ("no", "yes")[e.answer]} for e in drawn]
    if form == "messages":
        told = [({"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["label"]}) for r in rows]
        rows = [{"messages": [{"role": "system", "content": "Say yes or no."}, *turns]} for turns in told]
    file, shipped = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "small" / "rows"
    settings = {
        "benchmarks": [file],
        "model": {"dtype": "float32"},
        "tuning": {"shots": 16, "held_out": 8, "epochs": 1},
        "pruning": {"ratios": [0.2], "kinds": ["attention", "mlp"], "criterion": "magnitude_l2"},
        "goal": {"runtime": "vllm", "lose_at_most": 90, "choosing_rows": 10},
        "store": {"root": str(tmp_path / "store"), "export": str(shipped.parent), "reports": None},
    }
    assert read_answer(compose("smallest", build_config(SmallestConfig, settings))).proven is not None
    certificate, run = read_certificate(shipped, [file]), FolderExecutor(tmp_path, "", CPU)
    (_, prompts), *_ = certified_rows(run, certificate)
    compared, tokenizer = read_prompts(run.open(prompts), "evaluation"), load_tokenizer(shipped)
    card = (shipped / "README.md").read_text()
    assert "vllm serve path/to/this/folder --served-model-name rows" in card
    with served(vllm, shipped, tmp_path / "vllm.log", name="rows") as ask:
        for prompt, request in zip(compared, requests_of(compared, SCORED, read_chat(shipped)), strict=True):
            messages = request["messages"]
            read = ask("/tokenize", {"model": "rows", "messages": messages, "add_generation_prompt": True})
            chatted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert read["tokens"] == chatted == encode_pair(tokenizer, prompt.contexts[0], "x", bool(prompt.end))[0]
        url = ask.args[0]
        blocks = re.findall(r"```\w+\n(.*?)```", card, re.DOTALL)
        curl, client = (next(own for own in blocks if call in own) for call in ("curl", "OpenAI("))
        shown = ["bash", "-c", curl[curl.index("curl") :].replace("http://127.0.0.1:8000", url)]
        answer = json.loads(subprocess.run(shown, capture_output=True, timeout=300, check=True).stdout)
        with redirect_stdout(StringIO()) as printed:
            exec(client.replace("http://127.0.0.1:8000", url), {})
        assert printed.getvalue() == answer["choices"][0]["message"]["content"] + "\n"
        assert printed.getvalue().strip() in ("no", "yes")
        tests, _ = verify_server(run, certificate, ChatServer(url))
    assert tests["rows"].proven
    assert tests["rows"].small == pytest.approx(certificate.content.benchmarks["rows"].small, abs=0.04)
    assert len(compared) > 50


def test_two_adapters_answer_in_one_batch(
    pruned_smollm2: Path, adapters: dict[str, Path], vllm: str, tmp_path: Path
) -> None:
    prompt = load_tokenizer(pruned_smollm2)(PROMPTS[1])["input_ids"]
    modules = [f"{name}={folder}" for name, folder in adapters.items()]
    arguments = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "64", "--lora-modules", *modules)
    with served(vllm, pruned_smollm2, tmp_path / "vllm.log", *arguments) as ask, ThreadPoolExecutor() as pool:
        said = dict(zip(adapters, pool.map(lambda name: complete(ask, name, prompt), adapters), strict=True))
    expected = {name: by_transformers(pruned_smollm2, folder, prompt) for name, folder in adapters.items()}
    assert expected["arc_easy"][0] != expected["piqa"][0]
    for name, (tokens, logprobs) in expected.items():
        assert said[name][0] == tokens, name
        assert said[name][1] == pytest.approx(logprobs, abs=1e-3), name
