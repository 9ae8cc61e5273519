"""GGUF files against llama.cpp itself: the same logits, the same tokens, and plain words for what cannot be written."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import helpers
from llama_cpp import llama_cpp, with_ggml_gelu
from tailored_llama.config import ModelConfig, Work
from tailored_llama.errors import InputError
from tailored_llama.models import (
    FAMILIES,
    DenseSettings,
    load_model,
    load_tokenizer,
    prepare_dense,
    read_tokens,
    trim_tokenizer,
)
from tailored_llama.pruning.vocabulary import choose_tokens
from tailored_llama.serving import measure_speed, read_speed, write_gguf
from tailored_llama.serving.export import dequantise

IDS = [5, 9, 200, 31, 77, 14, 3, 8]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 RoPE": ("llama", {"rope_parameters": helpers.LLAMA3_ROPE}),
    "llama, linear RoPE": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False}),
    "phi3": ("phi3", {"pad_token_id": 0, "sliding_window": None, "tie_word_embeddings": False}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # whose graphs in llama.cpp scale, norm or bound more
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "pad_token_id": 0}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window": 4}),
    "gemma2, own scale of queries": ("gemma2", {"query_pre_attn_scalar": 2, "sliding_window": 64}),
    "gemma2, one bound": ("gemma2", {"query_pre_attn_scalar": 8, "attn_logit_softcapping": None}),
    "gemma2, 27b": ("gemma2", {"query_pre_attn_scalar": 8, "head_dim": 16, "num_hidden_layers": 46}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 8, "sliding_window": 4, "num_hidden_layers": 7}),
    "gemma3, every second layer": (
        "gemma3_text",
        {"query_pre_attn_scalar": 2, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "ministral3": ("ministral3", {}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    ),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4, "pad_token_id": 0}),
    "hunyuan": ("hunyuan_v1_dense", {"pad_token_id": 0}),
    "ernie4_5": ("ernie4_5", {"pad_token_id": 0}),
    "olmo2": ("olmo2", {"pad_token_id": 0, "tie_word_embeddings": False}),
    "olmo3": ("olmo3", {"sliding_window": 4, "pad_token_id": 0, "tie_word_embeddings": False}),
    "arcee": ("arcee", {"pad_token_id": 0}),
    "seed_oss": ("seed_oss", {"pad_token_id": 0}),
    "gemma3, scaled RoPE": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 8,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}

PADDED = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 33}


def save_tiny_llama(folder: Path, **changes: Any) -> Path:
    return helpers.add_merge(helpers.save_tiny_llama(folder, **changes))


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_llama_cpp_computes_the_same_logits(tmp_path: Path, name: str) -> None:
    architecture, changes = (MODELS | OTHERS)[name]
    checkpoint = save_tiny_llama(tmp_path / "dense", architecture=architecture, noise=0.1, **changes)
    written = write_gguf(checkpoint, gguf_type="f32", out=tmp_path / "model.gguf")
    assert written.architecture == FAMILIES[architecture].gguf
    assert written.padded_channels == 0
    with llama_cpp(tmp_path / "model.gguf") as runtime, torch.no_grad():
        expected = with_ggml_gelu(load_model(checkpoint))(torch.tensor([IDS])).logits[0]
        # A value between two entries of ggml's table of GELU may take one here and the other there: the CPU decides.
        atol = 4e-3 if architecture.startswith("gemma") else 1e-4 if name in MODELS else 1e-3
        torch.testing.assert_close(runtime.logits(IDS), expected, rtol=0, atol=atol)


def test_yarn_is_scaled_alike(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    checkpoint = save_tiny_llama(tmp_path / "dense", noise=0.1, rope_parameters=rope)
    write_gguf(checkpoint, gguf_type="f32", out=tmp_path / "model.gguf")
    ids = IDS * 12  # past the original context
    with llama_cpp(tmp_path / "model.gguf") as runtime, torch.no_grad():
        expected = load_model(checkpoint)(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(runtime.logits(ids), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("architecture", "changes"), MODELS.values(), ids=MODELS.keys())
def test_the_weights_of_a_file_are_taken_back_into_the_checkpoint_s_own_layout(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    checkpoint = save_tiny_llama(tmp_path / "dense", architecture=architecture, noise=0.1, **changes)
    write_gguf(checkpoint, gguf_type="f32", out=tmp_path / "model.gguf")
    (back := tmp_path / "back").mkdir()
    dequantise(checkpoint, tmp_path / "model.gguf", back)
    assert load_tokenizer(back)("a b")["input_ids"] == load_tokenizer(checkpoint)("a b")["input_ids"]
    expected, found = load_model(checkpoint).state_dict(), load_model(back).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["llama, tied", "phi3", "qwen2, untied", "qwen3", "gemma2, 27b", "gemma3"])
def test_a_file_is_read_again_as_a_model_with_the_same_logits(tmp_path: Path, name: str) -> None:
    architecture, changes = (MODELS | OTHERS)[name]
    checkpoint = save_tiny_llama(tmp_path / "dense", architecture=architecture, noise=0.1, **changes)
    write_gguf(checkpoint, gguf_type="f32", out=tmp_path / "model.gguf")
    (again := tmp_path / "again").mkdir()
    source = ModelConfig(source=str(tmp_path / "model.gguf"), dtype="float32")
    prepare_dense(settings=DenseSettings.of(source), work=Work(again))
    with torch.no_grad():
        expected, found = (load_model(path)(torch.tensor([IDS])).logits for path in (checkpoint, again))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("architecture", "changes"), OTHERS.values(), ids=OTHERS.keys())
def test_offset_norms_and_scaled_queries_are_taken_back(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    checkpoint = save_tiny_llama(tmp_path / "dense", architecture=architecture, noise=0.1, **changes)
    write_gguf(checkpoint, gguf_type="f32", out=tmp_path / "model.gguf")
    (back := tmp_path / "back").mkdir()
    dequantise(checkpoint, tmp_path / "model.gguf", back)
    expected, found = load_model(checkpoint).state_dict(), load_model(back).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gguf_type", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_padding_channels_to_blocks_changes_nothing(tmp_path: Path, gguf_type: Any) -> None:
    """llama.cpp computes of a file of blocks what it computes of the same weights without blocks and padding."""
    checkpoint = save_tiny_llama(tmp_path / "dense", noise=0.1, **PADDED)
    written = write_gguf(checkpoint, gguf_type=gguf_type, out=tmp_path / "blocks.gguf")
    assert written.padded_channels == (0 if gguf_type in ("f16", "bf16") else 4 * 31)
    assert written.kept_wider == 0
    (back := tmp_path / "back").mkdir()
    dequantise(checkpoint, tmp_path / "blocks.gguf", back)
    weights = load_file(back / "model.safetensors")
    for name, original in load_file(checkpoint / "model.safetensors").items():
        error = (weights[name] - original).norm() / original.norm()
        assert error < {"f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2}.get(gguf_type, 0.15), name
    for tensor in GGUFReader(tmp_path / "blocks.gguf").tensors:  # the padding of down_proj meets zeros, whatever it is
        if "ffn_gate" in tensor.name or "ffn_up" in tensor.name:
            assert not dequantize(tensor.data, tensor.tensor_type)[33:].any()
    exact = write_gguf(back, gguf_type="f32", out=tmp_path / "exact.gguf")
    assert written.size < exact.size
    with llama_cpp(tmp_path / "blocks.gguf") as blocks, llama_cpp(tmp_path / "exact.gguf") as plain:
        found, expected = blocks.logits(IDS), plain.logits(IDS)
    assert (found - expected).norm() < 0.05 * expected.norm()  # llama.cpp rounds states to the blocks' type, too


@pytest.mark.parametrize("gguf_type", ["q4_k_m", "q6_k"])
def test_k_quants_are_made_by_llama_cpp(tmp_path: Path, gguf_type: Any) -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 16, "intermediate_size": 250}
    checkpoint = save_tiny_llama(tmp_path / "dense", noise=0.1, initializer_range=0.05, **sizes)
    written = write_gguf(checkpoint, gguf_type=gguf_type, out=tmp_path / "model.gguf")
    exact = write_gguf(checkpoint, gguf_type="f32", out=tmp_path / "exact.gguf")
    assert written.size < exact.size / 3
    assert {t.tensor_type.name for t in GGUFReader(tmp_path / "model.gguf").tensors} & {"Q4_K", "Q6_K"}
    assert sorted(path.name for path in tmp_path.glob("*.gguf*")) == ["exact.gguf", "model.gguf"]
    with llama_cpp(tmp_path / "model.gguf") as runtime, llama_cpp(tmp_path / "exact.gguf") as plain:
        found, expected = runtime.logits(IDS), plain.logits(IDS)
    assert (found - expected).norm() < 0.5 * expected.norm()
    (back := tmp_path / "back").mkdir()
    dequantise(checkpoint, tmp_path / "model.gguf", back)
    weights = load_file(back / "model.safetensors")
    for name, original in load_file(checkpoint / "model.safetensors").items():
        assert (weights[name] - original).norm() < 0.15 * original.norm(), name


def test_matrices_that_are_no_whole_blocks_stay_in_f16(tmp_path: Path) -> None:
    checkpoint = save_tiny_llama(tmp_path / "dense", hidden_size=36, num_attention_heads=9, num_key_value_heads=3)
    written = write_gguf(checkpoint, gguf_type="q8_0", out=tmp_path / "model.gguf")
    assert written.kept_wider == 4 * 6 + 1  # all but the down projections, and the embedding
    with llama_cpp(tmp_path / "model.gguf") as runtime:
        assert runtime.logits(IDS).isfinite().all()


def test_a_window_ends_the_context(tmp_path: Path) -> None:
    checkpoint = save_tiny_llama(tmp_path / "dense", architecture="mistral", sliding_window=64)
    write_gguf(checkpoint, gguf_type="f32", out=tmp_path / "model.gguf")
    assert GGUFReader(tmp_path / "model.gguf").fields["llama.context_length"].contents() == 64


# Tokenizers

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, 1234 and 5.6e-7,  99  numbers",
    "line\n\nbreaks\tand tabs \n x",
    "Ünïcödé — 日本語 😀 … naïve café",
    "don't you'll WE'VE it's",
    "",
    " ",
]


def spm_tokenizer(folder: Path) -> Any:
    """BPE with byte fallback and a space in front, as converted from SentencePiece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    corpus = [text for text in TEXTS if text.isascii()] * 20
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are plain tokens
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=True
    )
    wrapped.save_pretrained(folder)
    return wrapped


def gemma_tokenizer() -> Any:
    """Byte fallback without a space in front, and with added tokens of white space and of markup."""
    tokenizer = helpers.spm_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ("\n\n", "\t", "<td>")])
    return tokenizer


TOKENIZERS = {"byte-level": helpers.bpe_tokenizer, "byte fallback": helpers.spm_tokenizer, "Gemma": gemma_tokenizer}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_trimmed_vocabulary_is_cut_alike_in_llama_cpp(tmp_path: Path, kind: str) -> None:
    dense, trimmed = helpers.save_worded_llama(tmp_path / "dense", TOKENIZERS[kind]()), tmp_path / "trimmed"
    helpers.save_tiny_llama(trimmed, vocab_size=448, bos_token_id=0, eos_token_id=0)
    tokens = read_tokens(dense)
    kept = choose_tokens(tokens, np.zeros(tokens.rows), 448).kept
    trim_tokenizer(dense, kept, [0.0] * tokens.rows, trimmed)
    write_gguf(trimmed, gguf_type="f32", out=tmp_path / "model.gguf")
    cutting = load_tokenizer(trimmed)
    with llama_cpp(tmp_path / "model.gguf", 2048) as runtime, torch.no_grad():
        for text in (helpers.words(200, seed=7), "bada\n\n\n <td>x", *(TEXTS if kind == "Gemma" else TEXTS[:-2])):
            assert runtime.tokens(text) == cutting(text)["input_ids"], text
        ids = cutting("bada bigo kulu")["input_ids"]
        expected = load_model(trimmed)(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(runtime.logits(ids), expected, rtol=0, atol=1e-4)


def test_tokens_of_a_sentencepiece_vocabulary_are_llama_cpp_s(tmp_path: Path) -> None:
    checkpoint = save_tiny_llama(tmp_path / "dense", vocab_size=416)
    spm_tokenizer(checkpoint)
    write_gguf(checkpoint, gguf_type="f32", out=tmp_path / "model.gguf")
    tokenizer = load_tokenizer(checkpoint)
    with llama_cpp(tmp_path / "model.gguf") as runtime:
        for text in TEXTS[:-2]:
            assert runtime.tokens(text) == tokenizer(text)["input_ids"], text


def test_special_tokens_and_the_chat_template_travel(tmp_path: Path) -> None:
    checkpoint = save_tiny_llama(tmp_path / "dense")
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(checkpoint)
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/name\n---\n# A model\n")
    write_gguf(checkpoint, gguf_type="f32", out=tmp_path / "model.gguf", name="My model")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    read = {name: field.contents() for name, field in fields.items()}
    assert read["tokenizer.chat_template"] == "{{ messages }}"
    assert (read["tokenizer.ggml.bos_token_id"], read["tokenizer.ggml.eos_token_id"]) == (tokenizer.bos_token_id,) * 2
    assert read["tokenizer.ggml.add_bos_token"] is False
    assert (read["general.name"], read["general.license"]) == ("My model", "apache-2.0")
    assert read["general.base_model.0.repo_url"] == "https://huggingface.co/owner/name"


# Refusals


def test_an_architecture_that_llama_cpp_lacks_is_one_line(tmp_path: Path) -> None:
    checkpoint = save_tiny_llama(tmp_path / "dense", architecture="helium", pad_token_id=0, num_key_value_heads=4)
    said = f"checkpoint {checkpoint}: architecture helium, which llama.cpp lacks; allowed: llama, mistral"
    with pytest.raises(InputError, match=f"^{re.escape(said)}"):
        write_gguf(checkpoint, gguf_type="f16", out=tmp_path / "model.gguf")


UNKNOWN_ORDERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "rope": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 1], "pad_token_id": 0},
        "no_rope_layers: got [1, 0, 1, 1]; allowed for llama.cpp: [1, 1, 1, 0]",
    ),
    "windows": (
        "gemma3_text",
        {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
        "layer_types: full attention in layers [0]; allowed for llama.cpp: in the last of every so many",
    ),
    "windows among layers without RoPE": (
        "exaone4",
        {"sliding_window": 4, "sliding_window_pattern": 4, "pad_token_id": 0},
        "sliding_window: got 4; allowed: null (in llama.cpp's architecture exaone4)",
    ),
    "scaled": (
        "qwen3",
        {"rope_parameters": helpers.LLAMA3_ROPE},
        "rope_type: got 'llama3'; allowed: default, linear, yarn (in llama.cpp's architecture qwen3)",
    ),
    "yarn": (
        "qwen3",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.5}},
        "mscale: got 0.5; allowed: null (in llama.cpp's architecture qwen3)",
    ),
    "partial": (
        "phi3",
        {"partial_rotary_factor": 0.75, "num_key_value_heads": 4, "pad_token_id": 0},
        "partial_rotary_factor: got 0.75; allowed: 1",
    ),
}


@pytest.mark.parametrize(("architecture", "changes", "said"), UNKNOWN_ORDERS.values(), ids=UNKNOWN_ORDERS.keys())
def test_layers_that_llama_cpp_does_not_compute_are_one_line(
    tmp_path: Path, architecture: str, changes: dict[str, Any], said: str
) -> None:
    checkpoint = save_tiny_llama(tmp_path / "dense", architecture=architecture, **changes)
    with pytest.raises(InputError, match=f"^{re.escape(f'{checkpoint}/config.json: {said}')}$"):
        write_gguf(checkpoint, gguf_type="f16", out=tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_broken_checkpoint_or_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_tiny_llama(tmp_path / "dense")
    out = tmp_path / "model.gguf"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("gguf.GGUFWriter.write_tensor_data", full)
        with pytest.raises(OSError, match="No space left"):
            write_gguf(checkpoint, gguf_type="f16", out=out)
    shutil.copytree(checkpoint, unmerged := tmp_path / "unmerged")
    helpers.byte_tokenizer().save_pretrained(unmerged)
    with pytest.raises(InputError, match="tokenizer: got no merges; allowed: at least one"):
        write_gguf(unmerged, gguf_type="f16", out=out)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        write_gguf(checkpoint, gguf_type="f16", out=out)
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, "pre-tokenizer: got {'type': 'Whitespace'}; allowed: that of smollm"),
        ("pre_tokenizer", None, "pre-tokenizer: got null; allowed: that of smollm"),
        ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "tokenizer: got WordLevel; allowed: BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_one_line(tmp_path: Path, part: str, value: Any, said: str) -> None:
    checkpoint = save_tiny_llama(tmp_path / "dense")
    file = checkpoint / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: value}))
    with pytest.raises(InputError, match=re.escape(said.replace("'", '"') if "pre-" in said else said)):
        write_gguf(checkpoint, gguf_type="f16", out=tmp_path / "model.gguf")


def test_a_rotary_embedding_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    checkpoint = save_tiny_llama(tmp_path / "dense", rope_parameters=rope)
    with pytest.raises(InputError, match="rope_type: got 'dynamic'; allowed: default, linear, yarn, llama3"):
        write_gguf(checkpoint, gguf_type="f16", out=tmp_path / "model.gguf")


def test_k_quants_without_llama_cpp_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_tiny_llama(tmp_path / "dense")
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync._cffi_bindings", None)
    with pytest.raises(InputError, match="type q4_k_m: needs llama-cpp-py-sync"):
        write_gguf(checkpoint, gguf_type="q4_k_m", out=tmp_path / "model.gguf")


def test_the_head_does_not_read_the_prompt_that_is_timed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It writes one token after the prompt. llama.cpp says so where it computes logits that nobody asked for."""
    checkpoint = save_tiny_llama(tmp_path / "dense", max_position_embeddings=512)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "speed").mkdir()
    write_gguf(checkpoint, gguf_type="f16", out=tmp_path / "gguf" / "model.gguf")
    measure_speed(tmp_path / "gguf", settings=None, work=Work(tmp_path / "speed"))
    assert set(read_speed(tmp_path / "speed")) == {"reading", "writing"}
    assert "overriding" not in capfd.readouterr().err
