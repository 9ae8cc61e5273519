"""SmolLM2, pruned, in a vLLM server: the same tokens and log-probabilities, two adapters in one batch.

By hand, with `make test-vllm`: vLLM lives in a virtual environment of its own.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from helpers import load_and_render, tune
from services import children, free_port, until
from tailored_llama.config import BenchmarkConfig, RunConfig
from tailored_llama.models import load_model, load_tokenizer, read_structure

pytestmark = pytest.mark.vllm
PROMPTS = ("The capital of France is", "Question: What do plants make from sunlight?\nAnswer:")
NEW_TOKENS = 24
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}
Complete = Callable[[str, list[int]], tuple[list[int], list[float]]]


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
def served(vllm: str, checkpoint: Path, log: Path, *arguments: str) -> Iterator[Complete]:
    """What `vllm serve` runs, in float32. That command itself does not start in the package vllm-cpu 0.32.0."""
    port = free_port()
    command = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--trust-remote-code"]
    command += ["--served-model-name", "base", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512"]
    command += ["--enforce-eager"]  # without it, vLLM compiles for minutes

    def complete(model: str, prompt: list[int]) -> tuple[list[int], list[float]]:
        asked: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        asked |= {"logprobs": 1, "return_token_ids": True, "ignore_eos": True}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=120)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    with children() as spawn:
        process = spawn(command, log, ENVIRONMENT)

        def ready() -> bool:
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
            except httpx.HTTPError:
                return False

        until(ready, 300, "vLLM's start", pause=0.5)
        yield complete


def by_transformers(checkpoint: Path, adapter: Path | None, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and the log-probability of each."""
    model, ids = load_model(checkpoint, adapter), torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        logprobs = model(ids[:, :-1]).logits[0, len(prompt) - 1 :].log_softmax(-1)
    new = ids[0, len(prompt) :]
    return new.tolist(), logprobs.gather(1, new[:, None])[:, 0].tolist()


def test_layers_of_different_widths_say_the_same(pruned_smollm2: Path, vllm: str, tmp_path: Path) -> None:
    assert len(set(read_structure(pruned_smollm2).layers)) > 1
    tokenizer = load_tokenizer(pruned_smollm2)
    with served(vllm, pruned_smollm2, tmp_path / "vllm.log") as complete:
        for prompt in (tokenizer(text)["input_ids"] for text in PROMPTS):
            tokens, logprobs = by_transformers(pruned_smollm2, None, prompt)
            said = complete("base", prompt)
            assert said[0] == tokens
            assert said[1] == pytest.approx(logprobs, abs=1e-3)


def test_two_adapters_answer_in_one_batch(
    pruned_smollm2: Path, adapters: dict[str, Path], vllm: str, tmp_path: Path
) -> None:
    prompt = load_tokenizer(pruned_smollm2)(PROMPTS[1])["input_ids"]
    modules = [f"{name}={folder}" for name, folder in adapters.items()]
    arguments = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "64", "--lora-modules", *modules)
    with served(vllm, pruned_smollm2, tmp_path / "vllm.log", *arguments) as complete, ThreadPoolExecutor() as pool:
        said = dict(zip(adapters, pool.map(lambda name: complete(name, prompt), adapters), strict=True))
    expected = {name: by_transformers(pruned_smollm2, folder, prompt) for name, folder in adapters.items()}
    assert expected["arc_easy"][0] != expected["piqa"][0]
    for name, (tokens, logprobs) in expected.items():
        assert said[name][0] == tokens, name
        assert said[name][1] == pytest.approx(logprobs, abs=1e-3), name
