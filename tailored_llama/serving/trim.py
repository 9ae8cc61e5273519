"""The vocabulary of a finished model trimmed: tokens leave by their rows, and all other tensors keep their bytes.

Rows of the embedding and the head are quantised one by one, in every type. So a GGUF file loses tokens as it is, of
whatever architecture: nothing is loaded as a model, and nothing is quantised anew.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, ReaderTensor, TokenType

from tailored_llama import models
from tailored_llama.errors import InputError, one_line
from tailored_llama.files import unfinished
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning import VocabularyPlan, prune_checkpoint, tokens_for_texts
from tailored_llama.serving.gguf_writing import GgufTensor, write_file

_TOKENS, _MERGES, _TYPES = (f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "token_type"))
_PER_TOKEN = (_TOKENS, "tokenizer.ggml.scores", _TYPES)  # lists with a value for each token
_MODEL, _KINDS = "tokenizer.ggml.model", {"gpt2": "byte-level BPE", "llama": "SentencePiece"}
_ROWS = re.compile(r"((per_layer_)?token_embd|output|blk\.\d+\.nextn\.(embed_tokens|shared_head_head))\.(weight|bias)")
_NOT_COPIED = re.compile(r"GGUF\..*|split\..*|general\.architecture|tokenizer\.huggingface\.json")
_STAY = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE)
_DEFAULTS = 12  # llama.cpp takes ids below this for special tokens that a file does not name
_SHOWN = 8  # tokens that left


@dataclass(frozen=True)
class Trimmed:
    """The result of trimming: bytes and tokens before and after, the share of text left whole, some removed tokens."""

    bytes: tuple[int, int]
    tokens: tuple[int, int]
    whole: float
    gone: tuple[str, ...]  # the most used first


def trim_checkpoint(model: Path, texts: Sequence[str], size: int | None, out: Path) -> Trimmed:
    """Write a checkpoint without the tokens that texts do not need, and its tokenizer, to an existing empty folder.

    `size` tokens stay, as in `tokens_for_texts`.
    """
    structure, tokenizer, tokens = models.read_structure(model), models.load_tokenizer(model), models.read_tokens(model)
    plan = tokens_for_texts(tokens, tokenizer, texts, size)
    prune_checkpoint(model, structure.layer, {}, out, tokens=plan)
    removed = (
        f"Of {tokens.rows:,} tokens, {len(plan.kept):,} are left, chosen by how often a text uses them; "
        "`vocabulary.parquet`\nlists them. All other weights are unchanged."
    )
    card = models.derived_card("A language model with a trimmed vocabulary", removed, model, out)
    (out / models.CARD).write_text(card, encoding="utf-8")
    return _trimmed((models.weight_bytes(model), models.weight_bytes(out)), tokens, tokenizer, plan)


def trim_gguf(model: Path, texts: Sequence[str], size: int | None, out: Path, progress: Progress = silent) -> Trimmed:
    """Write a GGUF file without the tokens that texts do not need; a broken file, or one of another kind, is refused.

    `size` tokens stay, as in `tokens_for_texts`; special, user-defined and byte tokens, and those of the chat template,
    stay in any case. The file appears when it is complete. `progress` is called after every tensor.
    """
    reader = models.open_gguf(model, str(model))
    try:
        values = {name: field.contents() for name, field in reader.fields.items()}
    except ValueError as error:
        raise InputError(f"{model}: metadata cannot be read ({one_line(error)})") from None
    for field, got, allowed in _problems(reader, values):
        raise InputError(f"{model}: {field}: got {got!s:.80}; allowed: {allowed}")
    rows, tokenizer = len(values[_TOKENS]), models.load_gguf_tokenizer(model, reader, str(model))
    special = {index for index, kind in enumerate(values.get(_TYPES, [])) if kind in _STAY}
    special -= {index for index in special if models.holds_place(values[_TOKENS][index])}
    special |= {*_ids(values).values(), *range(min(_DEFAULTS, rows))}
    tokens = models.tokens_of(tokenizer, rows, special, model)
    if _TYPES not in values:
        alone = {token for token in tokens.texts if not tokens.parts[token]}  # special ones are among them
        tokens = replace(tokens, always=frozenset(tokens.made_of(tokens.always | alone)))
    plan = tokens_for_texts(tokens, tokenizer, texts, size)
    with unfinished(out) as part:
        _write(reader, values, plan.kept, part, progress)
    return _trimmed((model.stat().st_size, out.stat().st_size), tokens, tokenizer, plan)


def _trimmed(sizes: tuple[int, int], tokens: models.Tokens, tokenizer: Any, plan: VocabularyPlan) -> Trimmed:
    left = np.setdiff1d(list(tokens.texts), plan.kept)
    gone = left[np.argsort(-plan.shares[left], kind="stable")][:_SHOWN]
    return Trimmed(sizes, (tokens.rows, len(plan.kept)), plan.whole, tuple(tokenizer.decode([i]) for i in gone))


def _ids(values: dict[str, Any]) -> dict[str, int]:
    """The metadata that are ids of tokens."""
    return {name: value for name, value in values.items() if name.endswith("_token_id")}


def _size_name(values: dict[str, Any]) -> str:
    """The name of the number of tokens, which not all files state."""
    return f"{values['general.architecture']}.vocab_size"


def _has_rows(tensor: ReaderTensor) -> bool:
    """Return whether a tensor has a row for each token."""
    return _ROWS.fullmatch(tensor.name) is not None


def _problems(reader: GGUFReader, values: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Why a file cannot be trimmed: a field, its value, and what is allowed. Each check relies on those before it."""
    if reader.byte_order != "I":
        yield "byte order", "big-endian", "little-endian"
    if (parts := values.get("split.count", 1)) not in (0, 1):
        yield "split.count", parts, "1; llama-gguf-split --merge joins the parts of a model"
    if not isinstance(values.get("general.architecture"), str):
        yield "general.architecture", values.get("general.architecture"), "a name"
    if values.get(_MODEL) not in _KINDS:
        yield _MODEL, values.get(_MODEL), " or ".join(f"{name} ({what})" for name, what in _KINDS.items())
    tokens: Any = values.get(_TOKENS)
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        yield _TOKENS, "none", "a list of texts"
    rows, each = len(tokens), f"one for each of {_TOKENS}"
    for name in _PER_TOKEN:
        if name in values and (not isinstance(values[name], list) or len(values[name]) != rows):
            got = f"{len(values[name])} values" if isinstance(values[name], list) else values[name]
            yield name, got, f"{rows} values, {each}"
    merges = values.get(_MERGES, [])
    for merge in merges if isinstance(merges, list) else [merges]:
        if not isinstance(merge, str) or merge.count(" ") != 1:
            yield _MERGES, repr(merge), "two texts with a space between, each"
    if (size := values.get(_size_name(values), rows)) != rows:
        yield _size_name(values), size, f"{rows}, the length of {_TOKENS}"
    for name, index in _ids(values).items():
        if type(index) is not int or not 0 <= index < rows:
            yield name, index, f"0 to {rows - 1}, the id of a token"
    if all(tensor.name != "token_embd.weight" for tensor in reader.tensors):
        yield "token_embd.weight", "no such tensor", "a language model, which has one"
    for tensor in reader.tensors:
        shape = tensor.shape.tolist()
        if not shape or 0 in shape:
            yield tensor.name, f"shape {shape}", "one size or more, all above 0"
        if _has_rows(tensor) and shape[-1] != rows:
            yield tensor.name, f"{shape[-1]} rows", f"{rows}, {each}"


def _write(reader: GGUFReader, values: dict[str, Any], kept: Sequence[int], out: Path, progress: Progress) -> None:
    writer = GGUFWriter(out, values["general.architecture"])
    writer.data_alignment = reader.alignment
    for name, value in {**values, **_trimmed_values(values, kept)}.items():
        kind, *items = reader.fields[name].types
        empty = kind == GGUFValueType.ARRAY and not value  # which the package gguf cannot write
        if not empty and not _NOT_COPIED.fullmatch(name):
            writer.add_key_value(name, value, kind, items[0] if items else None)
    tensors: list[GgufTensor] = []
    for tensor in reader.tensors:
        shape, rows = tensor.shape[::-1].tolist(), list(kept) if _has_rows(tensor) else slice(None)
        if _has_rows(tensor):
            shape[0] = len(kept)
        tensors.append((tensor.name, tuple(shape), tensor.tensor_type, partial(tensor.data.__getitem__, rows)))
    write_file(writer, tensors, progress)


def _trimmed_values(values: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The metadata that change: lists of tokens, merges, ids, and the number of tokens."""
    new = {old: index for index, old in enumerate(kept)}
    changed: dict[str, Any] = {name: [values[name][old] for old in kept] for name in _PER_TOKEN if name in values}
    changed |= {name: new[old] for name, old in _ids(values).items()}
    if _size_name(values) in values:
        changed[_size_name(values)] = len(kept)
    if _MERGES in values:
        texts, pairs = set(changed[_TOKENS]), (merge.split(" ") for merge in values[_MERGES])
        changed[_MERGES] = [f"{left} {right}" for left, right in pairs if models.is_kept(left, right, texts)]
        if not changed[_MERGES]:
            raise InputError(f"tokens: got {len(kept)}, which leaves no merge; allowed: more, as llama.cpp needs one")
    return changed
