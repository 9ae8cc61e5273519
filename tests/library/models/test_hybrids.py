"""Model types whose layers are no plain decoder's, such as hybrids; and the text part of those that read images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from helpers import byte_tokenizer, plain_loglikelihood, save_tiny_llama
from hybrids import HYBRIDS, save_hybrid
from tailored_llama.config import ExecutionConfig, ModelConfig, Work
from tailored_llama.data import Prompt, encode_prompt, loglikelihoods, shared_header
from tailored_llama.errors import InputError
from tailored_llama.evaluation import WrittenAnswer, generate
from tailored_llama.models import (
    DenseSettings,
    Document,
    cache_bytes,
    find_model,
    load_model,
    load_tokenizer,
    open_model,
    prepare_dense,
    read_config,
    read_structure,
    tokens_read,
)
from tailored_llama.models.families import FAMILIES, family_of
from tailored_llama.pruning import build_graph, read_groups
from tailored_llama.pruning.surgery import prune_checkpoint
from tailored_llama.pruning.vocabulary import VocabularyPlan

KEPT = (*range(0, 100, 3), 119, 256)
every_model = pytest.mark.parametrize("architecture", HYBRIDS)


def test_every_row_of_this_kind_is_tested() -> None:
    assert {name for name, family in FAMILIES.items() if not family.packed} <= HYBRIDS.keys()


@every_model
@pytest.mark.parametrize("header", ["", "Solved before: yes. " * 5], ids=["no header", "header"])
def test_prompts_score_as_plain_passes_do(tmp_path: Path, architecture: str, header: str) -> None:
    folder = save_hybrid(tmp_path / "dense", architecture)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    questions = [("The sky over the land is", " blue", " a very long way up"), ("Is it?", " no", " yes", " no!")]
    prompts = [
        Prompt(i, (header + context,) * len(choices), choices, 0, (1,) * len(choices))
        for i, (context, *choices) in enumerate(questions)
    ]
    encoded = [encode_prompt(tokenizer, prompt, 256) for prompt in prompts]
    assert len(shared_header(encoded)) == len(header)
    for prompt, row in zip(prompts, loglikelihoods(model, encoded, 256), strict=True):
        pairs = zip(prompt.contexts, prompt.continuations, strict=True)
        assert row == pytest.approx([plain_loglikelihood(model, tokenizer, *pair) for pair in pairs], abs=1e-4)


@every_model
def test_without_some_tokens_the_others_have_the_same_logits(tmp_path: Path, architecture: str) -> None:
    dense = save_hybrid(tmp_path / "dense", architecture)
    (groups := tmp_path / "groups").mkdir()
    build_graph(dense, settings=None, work=Work(groups))
    assert (len(read_groups(groups)) == 0) == (family_of(architecture).level == "tokens")
    (out := tmp_path / "pruned").mkdir()
    prune_checkpoint(dense, read_structure(dense).layer, {}, out, tokens=VocabularyPlan(KEPT, torch.ones(260).numpy()))
    model, size = load_model(out), read_structure(out).size
    assert size.vocab_size == len(KEPT) == read_config(out)["vocab_size"]
    new = torch.tensor([[3, 1, 7, 20, 5, 11]])
    with torch.no_grad():
        logits = model(new).logits
        expected = load_model(dense)(torch.tensor(KEPT)[new]).logits[..., list(KEPT)]
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)
    model.requires_grad_(True)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    tuned(new, labels=new).loss.backward()
    assert all(p.grad is not None for name, p in tuned.named_parameters() if "lora_" in name)


@every_model
def test_answers_written_side_by_side_are_those_written_alone(tmp_path: Path, architecture: str) -> None:
    """Shorter prompts are padded at their start, which convolutions and states must not see."""
    folder = save_hybrid(tmp_path / "dense", architecture)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    contexts, until = ["Is it?", "The sky over the land is as blue as"], WrittenAnswer(6, ())
    alone = [generate(model, tokenizer, [context], until)[0] for context in contexts]
    assert generate(model, tokenizer, contexts, until) == alone


def test_a_decoder_with_another_embedding_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "dense", architecture="gpt_neox")
    with pytest.raises(InputError, match=f"^model.source {folder}: architecture gpt_neox, without model.embed_tokens"):
        read_structure(folder)


def test_such_a_model_is_not_streamed(tmp_path: Path) -> None:
    folder = save_hybrid(tmp_path / "dense", "lfm2")
    said = "execution.streaming: got 'always' with a model of type lfm2; allowed: auto or never"
    with pytest.raises(InputError, match=f"^{said}$"):
        open_model(folder, ExecutionConfig(device="cpu", streaming="always"), tmp_path)


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_5": (
        {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32},
        HYBRIDS["qwen3_5_text"],
    ),
    "gemma3": (VISION | {"image_size": 28, "patch_size": 14}, {"query_pre_attn_scalar": 8}),
    "gemma4": (VISION | {"num_key_value_heads": 2, "head_dim": 16}, HYBRIDS["gemma4_text"]),
}


@pytest.mark.parametrize("architecture", WRAPPERS)
def test_of_a_model_that_reads_images_the_text_part_is_taken(
    tmp_path: Path, architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    vision, text = WRAPPERS[architecture]
    small = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "head_dim": 8}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0}
    config = AutoConfig.for_model(architecture, text_config=small | text, vision_config=vision)
    if architecture == "gemma4":
        config.audio_config = None
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(folder := tmp_path / "whole")
    byte_tokenizer().save_pretrained(folder)
    (out := tmp_path / "dense").mkdir()
    with caplog.at_level("INFO"):
        prepare_dense(settings=DenseSettings(find_model(ModelConfig(source=str(folder))), "float32"), work=Work(out))
    assert f"{folder}: it also reads images or sound; only its text part is taken" in caplog.messages
    ids = torch.tensor([[5, 9, 200, 31, 77]])
    with torch.no_grad():
        assert torch.equal(load_model(out)(ids).logits, whole(ids).logits)
    assert read_config(out)["model_type"] == f"{architecture}_text"
    said = (
        f"^{folder}: got a model that also reads images or sound; allowed: its text part, as `tailored-llama convert`"
    )
    with pytest.raises(InputError, match=said):
        load_model(folder)


def test_a_text_part_may_leave_sizes_to_the_defaults_of_its_type(tmp_path: Path) -> None:
    """As that of Gemma 3 4B does, which states neither heads nor their width."""
    text = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
    vision = VISION | {"image_size": 28, "patch_size": 14}
    whole = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    )
    whole.save_pretrained(folder := tmp_path / "whole")
    byte_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = text | {"model_type": "gemma3_text"}
    (folder / "config.json").write_text(json.dumps(config))
    (out := tmp_path / "dense").mkdir()
    prepare_dense(settings=DenseSettings(find_model(ModelConfig(source=str(folder))), "float32"), work=Work(out))
    assert (read_structure(out).head_dim, read_structure(out).layer.heads) == (256, 8)


def test_a_budget_counts_what_a_model_that_cannot_pack_reads_anew(tmp_path: Path) -> None:
    model = load_model(save_hybrid(tmp_path / "dense", "lfm2"))
    assert tokens_read(model, Document([1] * 30, [[2] * 3, [2] * 5]), header=100) == 2 * 135
    assert tokens_read(model, Document([1] * 30), header=100) == 130
    assert cache_bytes(read_structure(tmp_path / "dense")) == 2 * 2 * 4096 * 8 * 2 * 2  # two of four layers attend
