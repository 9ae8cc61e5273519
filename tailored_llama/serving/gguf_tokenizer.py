"""A tokenizer as GGUF metadata: tokens, types, merges or scores, pre-tokenizer, special tokens, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from tailored_llama.errors import InputError
from tailored_llama.models import load_tokenizer, pre_tokenizer_name


def write_tokenizer(writer: GGUFWriter, checkpoint: Path, vocab_size: int) -> None:
    """Write a checkpoint's tokenizer.

    Byte-level BPE becomes the model `gpt2`, BPE with byte fallback (SentencePiece) the model `llama`. Rows of the
    embedding without a token become unused tokens.

    Raises:
        InputError: the tokenizer is of another kind, or its pre-tokenizer is not one that llama.cpp has.
    """
    tokenizer = load_tokenizer(checkpoint)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        allowed = "BPE, byte-level or with byte fallback"
        raise InputError(f"{checkpoint}: tokenizer: got {model['type']}; allowed: {allowed}")
    if not model["merges"]:
        raise InputError(f"{checkpoint}: tokenizer: got no merges; allowed: at least one, which llama.cpp requires")
    added = {token["id"]: token for token in state["added_tokens"]}
    texts = {index: text for text, index in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(texts, model["merges"], vocab_size))
        writer.add_add_space_prefix(_adds_space(state))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer, checkpoint))
        writer.add_token_merges([f"{left} {right}" for left, right in model["merges"]])
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types(
        [_token_type(texts.get(index), added.get(index), tokenizer.unk_token) for index in range(vocab_size)]
    )
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        if (index := getattr(tokenizer, name)) is not None:
            getattr(writer, f"add_{name}")(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _scores(texts: dict[int, str], merges: list[list[str]], vocab_size: int) -> list[float]:
    """A score for each token, from which llama.cpp derives the order of merges: the higher, the sooner."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
    return [-float(first.get(texts.get(index, ""), len(merges))) for index in range(vocab_size)]


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether text gets a space in front, by a normaliser or a pre-tokenizer."""
    steps = [state.get("normalizer") or {}, state.get("pre_tokenizer") or {}]
    steps += [step for outer in steps for step in outer.get("normalizers", []) + outer.get("pretokenizers", [])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _token_type(text: str | None, added: dict[str, Any] | None, unknown: str | None) -> TokenType:
    if text is None:
        return TokenType.UNUSED
    if text == unknown and not text.startswith("<|"):  # a byte-level vocabulary names its end of text instead
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else TokenType.NORMAL
