"""A GGUF file to be trimmed: read whole, from one part or several, and refused where its metadata disagree."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader, ReaderTensor

from tailored_llama.errors import InputError, one_line
from tailored_llama.models import open_gguf

TOKENS, MERGES, TYPES = (f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "token_type"))
PER_TOKEN = (TOKENS, "tokenizer.ggml.scores", TYPES)  # lists with a value for each token
_MODEL, _KINDS = "tokenizer.ggml.model", {"gpt2": "byte-level BPE", "llama": "SentencePiece"}
_ROWS = re.compile(r"((per_layer_)?token_embd|output|blk\.\d+\.nextn\.(embed_tokens|shared_head_head))\.(weight|bias)")


@dataclass(frozen=True)
class Source:
    """The files of a model, and the metadata of the first."""

    parts: Sequence[Path]
    readers: Sequence[GGUFReader]
    values: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """The number of tokens."""
        return len(self.values[TOKENS])

    @property
    def tensors(self) -> list[ReaderTensor]:
        """The tensors of all parts."""
        return [tensor for reader in self.readers for tensor in reader.tensors]

    @property
    def ids(self) -> dict[str, int]:
        """The metadata that are ids of tokens."""
        return {name: value for name, value in self.values.items() if name.endswith("_token_id")}

    @property
    def vocab_size(self) -> str:
        """The name of the number of tokens, which not all files state."""
        return f"{self.values['general.architecture']}.vocab_size"


def has_rows(tensor: ReaderTensor) -> bool:
    """Whether a tensor has a row for each token."""
    return _ROWS.fullmatch(tensor.name) is not None


def read_source(model: Path) -> Source:
    """All parts of a model, checked; of a split one, `model` is any of them.

    Raises:
        InputError: a part is missing or broken, the metadata disagree, or the tokenizer is of a kind that cannot be
            trimmed.
    """
    parts = [model]
    if split := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", model.name):
        numbers = range(1, int(split[2]) + 1)
        parts = [model.with_name(f"{split[1]}-{number:05}-of-{split[2]}.gguf") for number in numbers] or parts
    for part in parts:
        if not part.is_file():
            raise InputError(f"{part}: no such file; allowed: a GGUF file, with all its parts if it is split")
    readers = [open_gguf(part, str(part)) for part in parts]
    try:
        values = {name: field.contents() for name, field in readers[0].fields.items()}
    except ValueError as error:
        raise InputError(f"{parts[0]}: metadata cannot be read ({one_line(error)})") from None
    source = Source(parts, readers, values)
    for field, got, allowed in _problems(source):
        raise InputError(f"{parts[0]}: {field}: got {got!s:.80}; allowed: {allowed}")
    return source


def _problems(source: Source) -> Iterator[tuple[str, Any, str]]:
    """Why a file cannot be trimmed: a field, its value, and what is allowed. Each check relies on those before it."""
    values, parts = source.values, len(source.parts)
    for number, (part, reader) in enumerate(zip(source.parts, source.readers, strict=True)):
        if reader.byte_order != "I":
            yield f"byte order of {part.name}", "big-endian", "little-endian"
        for name, expected in {"split.no": {number}, "split.count": {0, 1} if parts == 1 else {parts}}.items():
            if name in reader.fields and (found := reader.fields[name].contents()) not in expected:
                yield f"{name} of {part.name}", found, f"{max(expected)}; parts are named NAME-00001-of-00003.gguf"
    if not isinstance(values.get("general.architecture"), str):
        yield "general.architecture", values.get("general.architecture"), "a name"
    if values.get(_MODEL) not in _KINDS:
        yield _MODEL, values.get(_MODEL), " or ".join(f"{name} ({what})" for name, what in _KINDS.items())
    tokens = values.get(TOKENS)
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        yield TOKENS, "none", "a list of texts"
    for name in PER_TOKEN:
        if name in values and (not isinstance(values[name], list) or len(values[name]) != source.rows):
            got = f"{len(values[name])} values" if isinstance(values[name], list) else values[name]
            yield name, got, f"{source.rows} values, one for each of {TOKENS}"
    merges = values.get(MERGES, [])
    for merge in merges if isinstance(merges, list) else [merges]:
        if not isinstance(merge, str) or merge.count(" ") != 1:
            yield MERGES, repr(merge), "two texts with a space between, each"
    if (size := values.get(source.vocab_size, source.rows)) != source.rows:
        yield source.vocab_size, size, f"{source.rows}, the length of {TOKENS}"
    for name, index in source.ids.items():
        if type(index) is not int or not 0 <= index < source.rows:
            yield name, index, f"0 to {source.rows - 1}, the id of a token"
    yield from _tensor_problems(source)


def _tensor_problems(source: Source) -> Iterator[tuple[str, Any, str]]:
    names = [tensor.name for tensor in source.tensors]
    if "token_embd.weight" not in names:
        yield "token_embd.weight", "no such tensor", "a language model, which has one"
    if twice := {name for name in names if names.count(name) > 1}:
        yield min(twice), "two tensors of this name", "one"
    if (count := source.values.get("split.tensors.count", len(names))) != len(names):
        yield "split.tensors.count", count, f"{len(names)}, the tensors of all parts"
    for tensor in source.tensors:
        shape = tensor.shape.tolist()
        if not shape or 0 in shape:
            yield tensor.name, f"shape {shape}", "one size or more, all above 0"
        if has_rows(tensor) and shape[-1] != source.rows:
            yield tensor.name, f"{shape[-1]} rows", f"{source.rows}, one for each of {TOKENS}"
