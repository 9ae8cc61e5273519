"""Every LLaMA-family architecture: what is removed is what was zeroed, and the rest loads, generates and is tuned."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from helpers import LLAMA3_ROPE, plain_loglikelihood, prune, save_tiny_llama
from tailored_llama.config import PruningConfig, Work
from tailored_llama.data import Prompt, encode_prompt, loglikelihoods, shared_header
from tailored_llama.errors import InputError
from tailored_llama.models import load_model, load_tokenizer, read_config, read_structure
from tailored_llama.pruning import build_graph, read_groups
from tailored_llama.pruning.groups import check_coupling, owners_of
from tailored_llama.pruning.importance import write_importance

IDS = torch.tensor([[5, 9, 200, 31, 77, 14, 3, 8]])
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaMA 1 and 2 (MHA, untied)": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "LLaMA 3.2 (GQA, tied, scaled RoPE)": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "SmolLM (9 heads over 3)": (
        "llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "head_dim": 4},
    ),
    "LLaMA with all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "MQA": ("llama", {"num_key_value_heads": 1}),
    "head_dim 6": ("llama", {"head_dim": 6}),
    "Mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "Mistral (sliding window)": ("mistral", {"sliding_window": 64}),
    "Qwen2 (biases on q, k, v)": ("qwen2", {}),
    "Qwen2 (sliding in later layers)": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    ),
    "Qwen3 (norms on q and k)": ("qwen3", {}),
    "Gemma": ("gemma", {"head_dim": 16}),
    "Gemma 2 (soft-capping)": (
        "gemma2",
        {"query_pre_attn_scalar": 8, "sliding_window": 64, "attn_logit_softcapping": 2.0},
    ),
    "Gemma 3": ("gemma3_text", {"query_pre_attn_scalar": 8, "sliding_window": 64}),
    "Phi-3 (fused)": ("phi3", {"pad_token_id": 0, "sliding_window": None}),
    "Phi-3 (fused, MHA, partial RoPE)": (
        "phi3",
        {"pad_token_id": 0, "num_key_value_heads": 4, "head_dim": 8, "partial_rotary_factor": 0.75},
    ),
    "Ministral 3 (scaled by position)": ("ministral3", {"sliding_window": None}),
    "Granite (multipliers)": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    ),
    "EXAONE 4 (norms after, hybrid attention)": (
        "exaone4",
        {"sliding_window": 64, "sliding_window_pattern": 4, "pad_token_id": 0},
    ),
    "Hunyuan (norms after RoPE)": ("hunyuan_v1_dense", {"pad_token_id": 0}),
    "ERNIE 4.5 (interleaved RoPE)": ("ernie4_5", {"use_bias": True, "pad_token_id": 0}),
    "Seed-OSS": ("seed_oss", {"pad_token_id": 0}),
    "OLMo 2 (norms over all heads)": ("olmo2", {"pad_token_id": 0}),
    "OLMo 3 (sliding window)": ("olmo3", {"sliding_window": 64, "pad_token_id": 0}),
    "Helium": ("helium", {"pad_token_id": 0, "num_key_value_heads": 4}),
    "GLM (fused gate, partial RoPE)": ("glm", {"pad_token_id": 0}),
    "GLM 4 (norms around)": ("glm4", {"pad_token_id": 0}),
    "Arcee (no gate)": ("arcee", {"pad_token_id": 0}),
    "Apertus (no gate, norms on q and k)": ("apertus", {"pad_token_id": 0}),
    "CWM (sliding window)": ("cwm", {"sliding_window": 64, "pad_token_id": 0}),
    "Qwen3.5 (hybrid)": ("qwen3_5_text", LINEAR | {"pad_token_id": 0}),
    "OLMo (hybrid)": ("olmo_hybrid", {"pad_token_id": 0}),
    "SmolLM3 (layers without RoPE)": ("smollm3", {"no_rope_layer_interval": 2, "pad_token_id": 0}),
}
PRUNING = PruningConfig(min_channels=2)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"]

every_model = pytest.mark.parametrize(("architecture", "changes"), MODELS.values(), ids=MODELS.keys())


def prepare(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> tuple[Path, Path]:
    dense = save_tiny_llama(tmp_path / "dense", architecture=architecture, noise=0.1, **changes)
    groups = tmp_path / "groups"
    groups.mkdir()
    build_graph(dense, settings=None, work=Work(groups))
    return dense, groups


def pruned(tmp_path: Path, dense: Path, folder: Path) -> Path:
    groups = read_groups(folder)
    write_importance(folder, groups, np.random.default_rng(1).random(len(groups)), "random")
    out = tmp_path / "pruned"
    out.mkdir()
    prune(dense, folder, folder, None, ratio=0.2, pruning=PRUNING, out=out)
    return out


@every_model
def test_every_layer_couples_what_the_first_does(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    dense, _ = prepare(tmp_path, architecture, changes)
    layer = read_structure(dense).layer
    check_coupling(read_config(dense), layer.heads, layer.channels)


@every_model
@pytest.mark.parametrize("header", ["", "Solved before: yes. " * 5], ids=["no header", "header"])
def test_packed_rows_score_as_plain_passes_do_beyond_any_sliding_window(
    tmp_path: Path, architecture: str, changes: dict[str, Any], header: str
) -> None:
    narrow = {name: 24 for name, value in changes.items() if name == "sliding_window" and value}
    folder = save_tiny_llama(tmp_path / "dense", architecture=architecture, noise=0.1, **(changes | narrow))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    model.set_attn_implementation("eager")  # all that an architecture asks of attention
    questions = [("The sky over the whole of the land is", " blue", " a very long way up"), ("Is it?", " no", " yes")]
    prompts = [
        Prompt(i, (header + context,) * 2, choices, 0, (1, 1)) for i, (context, *choices) in enumerate(questions)
    ]
    encoded = [encode_prompt(tokenizer, prompt, 256) for prompt in prompts]
    assert len(shared_header(encoded)) == len(header)
    for prompt, row in zip(prompts, loglikelihoods(model, encoded, 256), strict=True):
        pairs = zip(prompt.contexts, prompt.continuations, strict=True)
        assert row == pytest.approx([plain_loglikelihood(model, tokenizer, *pair) for pair in pairs], abs=1e-4)


@every_model
def test_removing_equals_zeroing_and_the_rest_is_a_model(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    dense, folder = prepare(tmp_path, architecture, changes)
    out = pruned(tmp_path, dense, folder)
    kept = np.array(pd.read_parquet(out / "plan.parquet")["kept"])
    masked = load_model(dense)
    parameters = dict(masked.named_parameters())
    for name, (dim, owner) in owners_of(dense).items():
        gone = torch.from_numpy(np.flatnonzero((owner >= 0) & ~kept[owner]))
        parameters[name].data.index_fill_(dim, gone, 0)
    model = load_model(out)
    with torch.no_grad():
        logits = model(IDS).logits
        torch.testing.assert_close(logits, masked(IDS).logits, rtol=0, atol=5e-5)
    stored = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}  # a tied head once
    assert sum(stored.values()) == read_structure(out).parameters

    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, logits)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    cached, plain = (again.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    again.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, logits, rtol=0, atol=5e-5)

    tuned = get_peft_model(again, LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    tuned(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in tuned.named_parameters() if "lora_" in name)


LOADED_ALONE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in map(Path, sys.argv[1:]):
    expected = load_file(folder / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder / "pruned").eval()
    assert torch.equal(model(expected["ids"]).logits, expected["logits"]), folder.name
    print(model.config.model_type)
assert "tailored_llama" not in sys.modules
"""


def test_a_clean_process_loads_checkpoints_without_the_library(tmp_path: Path) -> None:
    """One process: it starts slowly."""
    types, folders = ("llama", "qwen3", "gemma3_text", "phi3", "exaone4"), []
    changes = dict(MODELS.values())
    for architecture in types:
        folders.append(tmp_path / architecture)
        dense, groups = prepare(folders[-1], architecture, changes[architecture])
        out = pruned(folders[-1], dense, groups)
        with torch.no_grad():
            logits = load_model(out)(IDS).logits
        save_file({"ids": IDS, "logits": logits}, folders[-1] / "expected.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", LOADED_ALONE, *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(types)


@pytest.mark.parametrize("model_type", ["t5", "tailored_llama"])  # the latter was of layers of different widths
def test_an_architecture_that_is_not_supported_is_named(tmp_path: Path, model_type: str) -> None:
    dense = save_tiny_llama(tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text()) | {"model_type": model_type}
    (dense / "config.json").write_text(json.dumps(config))
    said = f"^model.source {dense}: architecture {model_type}; allowed: llama, mistral, ministral3, .*"
    for read in (read_structure, load_model):
        with pytest.raises(InputError, match=said):
            read(dense)
