"""Models of which only tokens, or tokens and channels, leave, through the whole of a run and of a search."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compositions import compose
from helpers import bpe_tokenizer, save_worded_llama, write_jsonl
from hybrids import HYBRIDS
from llama_cpp import llama_cpp
from tailored_llama.config import SmallestConfig, build_config, validate_config
from tailored_llama.errors import InputError
from tailored_llama.evaluation import read_answer
from tailored_llama.models import read_structure
from tailored_llama.pipeline import FolderExecutor, read_certificate, verify_certificate
from tailored_llama.pipeline.smallest import check_smallest
from tailored_llama.serving import load


@pytest.fixture(params=["lfm2", "mixtral"])
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    changes = {"architecture": request.param, "pad_token_id": 0} | HYBRIDS[request.param]
    return save_worded_llama(tmp_path / "worded", bpe_tokenizer(4096), **changes)


def test_a_run_removes_tokens_tunes_and_exports(own_run: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    size = read_structure(dense).size
    kept = 64 * (size.vocab_size // 64 - 3)
    ratio = (size.vocab_size - kept) * size.row / size.parameters
    own_run |= {"model": {"source": str(dense), "dtype": "float32"}, "pruning": {"ratios": [ratio]}}
    own_run["store"]["export"] = str(tmp_path / "finished")
    own_run["tuning"]["keep"] = "always"
    compose("tailor", validate_config(own_run))
    (finished,) = (tmp_path / "finished").iterdir()
    assert read_structure(finished).size.vocab_size == kept
    model = AutoModelForCausalLM.from_pretrained(finished)
    assert model.generate(torch.tensor([[5, 9, 20]]), max_new_tokens=4).shape[1] > 3
    own_run["pruning"] = {"ratios": [0.9]}
    with pytest.raises(InputError, match=r"^pruning.ratios: got 0.9; allowed: at most 0.\d+ with tokens alone$"):
        compose("tailor", validate_config(own_run))


def test_a_run_removes_channels_of_a_hybrid(own_run: dict[str, Any], tmp_path: Path) -> None:
    sizes = HYBRIDS["qwen3_5_text"] | {"pad_token_id": 0}
    dense = save_worded_llama(tmp_path / "worded", architecture="qwen3_5_text", **sizes)
    own_run |= {"model": {"source": str(dense), "dtype": "float32"}}
    own_run["pruning"] = {"ratios": [0.1], "kinds": ["attention", "mlp"], "min_channels": 4}
    own_run["store"] |= {"export": str(tmp_path / "finished"), "export_formats": ["safetensors", "gguf:bf16"]}
    own_run["tuning"]["keep"] = "always"
    compose("tailor", validate_config(own_run))
    written, finished = sorted((tmp_path / "finished").iterdir(), key=lambda folder: not list(folder.glob("*.gguf")))
    before, after = read_structure(dense), read_structure(finished)
    assert after.parameters == pytest.approx(0.9 * before.parameters, rel=0.01)
    assert (after.layer.heads, after.layer.channels < before.layer.channels) == (before.layer.heads, True)
    model, ids = AutoModelForCausalLM.from_pretrained(finished), [5, 9, 20]
    assert model.generate(torch.tensor([ids]), max_new_tokens=4).shape[1] > 3
    with llama_cpp(next(written.glob("*.gguf"))) as runtime, torch.no_grad():
        alike = torch.cosine_similarity(runtime.logits(ids), model(torch.tensor([ids])).logits[0])
    assert alike.min() > 0.99


def test_a_search_for_llama_cpp_is_refused_before_any_work(own_run: dict[str, Any], tmp_path: Path) -> None:
    dense = save_worded_llama(tmp_path / "worded", architecture="olmo_hybrid", pad_token_id=0)
    own_run |= {"model": {"source": str(dense)}, "goal": {"runtime": "llama.cpp"}}
    said = "goal.runtime: got 'llama.cpp' for architecture olmo_hybrid, which llama.cpp lacks; allowed: transformers or"
    with pytest.raises(InputError, match=f"^{said} vllm$"):
        check_smallest(build_config(SmallestConfig, own_run))


def test_a_search_tries_the_tokens_that_can_leave(own_run: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    things = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}
    rows = [{"text": f"number {i}: the {t} is", "label": things[t]} for i, t in enumerate([*things] * 75)]
    config = {
        "benchmarks": [{"name": "colours", "data": write_jsonl(tmp_path / "rows.jsonl", rows)}],
        "model": {"source": str(dense), "dtype": "float32"},
        "calibration": {"samples": 4, "tokens": 64, "source": own_run["calibration"]["source"]},
        "tuning": {"epochs": 1},
        "goal": {"lose_at_most": 60, "types": ["q8_0"], "even_if_unprovable": True},
        "store": own_run["store"] | {"export": str(tmp_path / "smallest")},
    }
    answer = read_answer(compose("smallest", build_config(SmallestConfig, config)))
    assert answer.proven is not None
    assert "trimmed" in answer.candidates[answer.proven].label
    assert answer.failed
    assert all(told.endswith("with tokens alone") for told in answer.failed.values())
    assert (tmp_path / "smallest" / "colours" / "colours-q8_0.gguf").is_file()
    model = load(tmp_path / "smallest" / "colours")
    assert str(model.answer("number 1: the sky")) in things.values()
    certificate = read_certificate(tmp_path / "smallest" / "colours", [str(tmp_path / "rows.jsonl")])
    (tmp_path / "again").mkdir()
    executor = FolderExecutor(tmp_path / "again", certificate.config.store.downloads, certificate.config.execution)
    assert verify_certificate(executor, certificate)["colours"].loss == certificate.content.benchmarks["colours"].loss
