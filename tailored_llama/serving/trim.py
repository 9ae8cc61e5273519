"""The vocabulary of a finished model trimmed: tokens leave by their rows, and all other tensors keep their bytes.

Rows of the embedding and the head are quantised one by one, in every type. So a GGUF file loses tokens as it is, of
whatever architecture: nothing is loaded as a model, and nothing is quantised anew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter, TokenType

from tailored_llama import models
from tailored_llama.errors import InputError
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning import VocabularyPlan, prune_checkpoint, tokens_for_texts
from tailored_llama.serving.gguf_source import MERGES, PER_TOKEN, TOKENS, TYPES, Source, has_rows, read_source
from tailored_llama.serving.gguf_writing import GgufTensor, unfinished, write_file

_NOT_COPIED = re.compile(r"GGUF\..*|split\..*|general\.architecture|tokenizer\.huggingface\.json")
_STAY = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE)
_DEFAULTS = 12  # llama.cpp takes ids below this for special tokens that a file does not name
_SHOWN = 8  # tokens that left


@dataclass(frozen=True)
class Trimmed:
    """What trimming did: bytes and tokens before and after, the share of the texts' tokens that stay whole, and tokens
    that left, the most used first."""

    bytes: tuple[int, int]
    tokens: tuple[int, int]
    whole: float
    gone: tuple[str, ...]


def trim_checkpoint(model: Path, texts: Sequence[str], size: int | None, out: Path) -> Trimmed:
    """Write a checkpoint without the tokens that texts do not need, and its tokenizer, to an existing empty folder.

    `size` tokens stay, as in `tokens_for_texts`.

    Raises:
        InputError: the checkpoint is broken, or as `tokens_for_texts`.
    """
    structure, tokenizer, tokens = models.read_structure(model), models.load_tokenizer(model), models.read_tokens(model)
    plan = tokens_for_texts(tokens, tokenizer, texts, size)
    prune_checkpoint(model, structure.layers, {}, out, tokens=plan)
    before, left = structure.size.vocab_size, models.read_structure(out).size.vocab_size
    removed = f"""Of {before:,} tokens, {left:,} are left, chosen by how often a text uses them; `vocabulary.parquet`
lists them. All other weights are unchanged."""
    card = models.derived_card("A language model with a trimmed vocabulary", removed, model, out)
    (out / models.CARD).write_text(card, encoding="utf-8")
    return _trimmed((models.weight_bytes(model), models.weight_bytes(out)), tokens, tokenizer, plan)


def trim_gguf(model: Path, texts: Sequence[str], size: int | None, out: Path, progress: Progress = silent) -> Trimmed:
    """Write a GGUF file without the tokens that texts do not need.

    `size` tokens stay, as in `tokens_for_texts`; special, user-defined and byte tokens, and those of the chat template,
    stay in any case. Of a split file, any part may be given; all are read, and one file is written. It appears when it
    is complete. `progress` is called after every tensor.

    Raises:
        InputError: the file is broken, its metadata disagree, its tokenizer is of another kind, or as
            `tokens_for_texts`.
    """
    source = read_source(model)
    tokenizer = models.load_gguf_tokenizer(source.parts[0], source.readers[0], str(source.parts[0]))
    tokens = _tokens(source, tokenizer)
    plan = tokens_for_texts(tokens, tokenizer, texts, size)
    with unfinished(out) as part:
        _write(source, plan.kept, part, progress)
    before = sum(file.stat().st_size for file in source.parts)
    return _trimmed((before, out.stat().st_size), tokens, tokenizer, plan)


def _trimmed(sizes: tuple[int, int], tokens: models.Tokens, tokenizer: Any, plan: VocabularyPlan) -> Trimmed:
    left = np.setdiff1d(list(tokens.texts), plan.kept)
    gone = left[np.argsort(-plan.shares[left], kind="stable")][:_SHOWN]
    return Trimmed(sizes, (tokens.rows, len(plan.kept)), plan.whole, tuple(tokenizer.decode([i]) for i in gone))


def _tokens(source: Source, tokenizer: Any) -> models.Tokens:
    """The tokens of a file, and which of them must stay."""
    types = source.values.get(TYPES)
    special = {index for index, kind in enumerate(types or ()) if kind in _STAY}
    special |= {*source.ids.values(), *range(min(_DEFAULTS, source.rows))}
    tokens = models.tokens_of(tokenizer, source.rows, special, source.parts[0])
    if types:
        return tokens
    alone = [token for token in tokens.texts if not tokens.parts[token]]  # special ones are among them
    return replace(tokens, always=frozenset(tokens.made_of({*tokens.always, *alone})))


def _write(source: Source, kept: Sequence[int], out: Path, progress: Progress) -> None:
    """Write a file with the kept tokens alone."""
    changed, fields = _trimmed_values(source, kept), source.readers[0].fields
    writer = GGUFWriter(out, source.values["general.architecture"])
    writer.data_alignment = source.readers[0].alignment
    for name, value in {**source.values, **changed}.items():
        kind, *items = fields[name].types
        empty = kind == GGUFValueType.ARRAY and not value  # which the package gguf cannot write
        if not empty and not _NOT_COPIED.fullmatch(name):
            writer.add_key_value(name, value, kind, items[0] if items else None)
    tensors: list[GgufTensor] = []
    for tensor in source.tensors:
        shape, rows = tensor.shape[::-1].tolist(), list(kept) if has_rows(tensor) else slice(None)
        first = len(kept) if has_rows(tensor) else shape[0]
        data = partial(tensor.data.__getitem__, rows)
        tensors.append((tensor.name, (first, *shape[1:]), tensor.tensor_type, data))
    write_file(writer, tensors, progress)


def _trimmed_values(source: Source, kept: Sequence[int]) -> dict[str, Any]:
    """The metadata that change: lists of tokens, merges, ids, and the number of tokens."""
    values, new = source.values, {old: index for index, old in enumerate(kept)}
    changed: dict[str, Any] = {name: [values[name][old] for old in kept] for name in PER_TOKEN if name in values}
    changed |= {name: new[old] for name, old in source.ids.items()}
    if source.vocab_size in values:
        changed[source.vocab_size] = len(kept)
    if MERGES in values:
        texts, pairs = set(changed[TOKENS]), (merge.split(" ") for merge in values[MERGES])
        changed[MERGES] = [f"{left} {right}" for left, right in pairs if models.is_kept(left, right, texts)]
        if not changed[MERGES]:
            raise InputError(f"tokens: got {len(kept)}, which leaves no merge; allowed: more, as llama.cpp needs one")
    return changed
