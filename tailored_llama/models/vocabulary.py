"""Vocabularies: which tokens of a tokenizer must stay, and the tokenizer without the others.

Byte-level BPE and BPE with byte fallback (SentencePiece) can be trimmed: both write single bytes where no token fits.
"""

import itertools
import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from tokenizers import Tokenizer, pre_tokenizers

from tailored_llama.errors import InputError, one_line
from tailored_llama.memory import without_gc
from tailored_llama.models.checkpoints import read_config
from tailored_llama.models.id_table import write_id_table
from tailored_llama.models.load import load_tokenizer

_GENERATION = "generation_config.json"
_SPACE = "\u2581"  # SentencePiece's
_PLACEHOLDER = re.compile(r"[<\[]\W*(unused|reserved|dummy|place.?holder|extra_\d|special_\d)", re.IGNORECASE)
_CHATS = (("user",), ("user", "assistant"), ("system", "user", "assistant", "user"))


@dataclass(frozen=True)
class Tokens:
    """The tokens of a checkpoint whose tokenizer can be trimmed."""

    rows: int  # of the embedding
    texts: Mapping[int, str]  # by id, as `tokenizer.json` writes them
    parts: Mapping[int, tuple[int, ...]]  # for every token the two of its last merge, or none
    always: frozenset[int]  # bytes, special and added ones, the chat template's, and what these are made of

    def made_of(self, tokens: Iterable[int], besides: Container[int] = ()) -> set[int]:
        """Tokens and all that they are made of, without `besides`, which has all that its own are made of."""
        waiting, found = list(tokens), set[int]()
        while waiting:
            token = waiting.pop()
            if token not in found and token not in besides:
                found.add(token)
                waiting += self.parts[token]
        return found


@without_gc()
def read_tokens(checkpoint: Path) -> Tokens:
    """The tokens of a checkpoint, as `tokens_of`."""
    config = read_config(checkpoint)
    rows = int(config["vocab_size"])
    special = _special_ids(config, rows) | _special_ids(_generation(checkpoint), rows)
    return tokens_of(load_tokenizer(checkpoint), rows, special, checkpoint)


def tokens_of(tokenizer: Any, rows: int, special: Iterable[int], shown: Any) -> Tokens:
    """The tokens of a model without added ones that have no row, such as those for images.

    `special` must stay besides what the tokenizer itself names; `shown` is the model's name in messages. Raises
    InputError if the tokenizer is of a kind that cannot be trimmed, or merges make a token without a row.
    """
    state = _state(tokenizer, shown)
    model = state["model"]
    ids, texts = model["vocab"], _texts(state, rows)
    added = {token["id"] for token in state["added_tokens"] if token["id"] < rows and not holds_place(token["content"])}
    if (largest := max(texts)) >= rows:
        raise InputError(
            f"{shown}: token {texts[largest]!r} has id {largest}; allowed: below {rows}, the rows of the embedding"
        )
    around = {step[place] for step, place in _processor_places(state)}
    always = {*added, *special, *around, *_written_alone(model), *_chat_ids(tokenizer, shown)}
    tokens = Tokens(rows, texts, _Parts(ids, texts, model["merges"]), frozenset())
    return replace(tokens, always=frozenset(tokens.made_of(always)))


def holds_place(text: str) -> bool:
    """Whether an added token is kept free by its name, as `<unused7>` is: the model was not trained on it."""
    return _PLACEHOLDER.match(text) is not None


def _texts(state: dict[str, Any], rows: int) -> dict[int, str]:
    """Every token by id, as `tokenizer.json` writes it; added ones without a row are none."""
    added = {token["id"]: token["content"] for token in state["added_tokens"] if token["id"] < rows}
    return {index: text for text, index in state["model"]["vocab"].items()} | added


def _state(tokenizer: Any, shown: Any) -> dict[str, Any]:
    """The JSON of a fast tokenizer of a kind that can be trimmed."""
    allowed = "allowed: byte-level BPE, or BPE with byte fallback; else pruning.kinds without vocabulary"
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"{shown}: tokenizer: got {type(tokenizer).__name__}, which has no fast form; {allowed}")
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise InputError(f"{shown}: tokenizer: got {model['type']}; {allowed}")
    steps = [state.get("pre_tokenizer") or {}]
    steps += steps[0].get("pretokenizers", [])
    if not model.get("byte_fallback") and not any(step.get("type") == "ByteLevel" for step in steps):
        raise InputError(f"{shown}: tokenizer: got BPE over characters; {allowed}")
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(field):
            raise InputError(f"{shown}: tokenizer: got BPE with {field} {model[field]!r}; {allowed}")
    return state


def _written_alone(model: dict[str, Any]) -> set[int]:
    """Tokens that no others can write: bytes, SentencePiece's space, the unknown token, and what is not bytes."""
    ids: dict[str, int] = model["vocab"]
    if model.get("byte_fallback"):
        alone = [_SPACE, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        alphabet = set(pre_tokenizers.ByteLevel.alphabet()) & ids.keys()
        alone = [*alphabet, *(text for text in ids if not alphabet.issuperset(text))]
    return {ids[text] for text in (*alone, model.get("unk_token")) if text in ids}


class _Parts(dict[int, tuple[int, ...]]):
    """The two tokens of the last merge of a token, as BPE makes it of its characters; found when it is asked for.

    SentencePiece vocabularies list all merges that give a token; which one BPE takes depends on their ranks.
    """

    def __init__(self, ids: Mapping[str, int], texts: Mapping[int, str], merges: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.ids, self.texts, self.making = ids, texts, dict[str, list[tuple[str, str]]]()
        pairs = [(left, right) for left, right in merges]
        for pair in pairs:
            self.making.setdefault("".join(pair), []).append(pair)
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)} if len(self.making) < len(pairs) else {}

    def __missing__(self, token: int) -> tuple[int, ...]:
        text = self.texts.get(token, "")
        pairs = self.making.get(text, []) if self.ids.get(text) == token else []
        last = pairs[0] if len(pairs) == 1 else _last_merge(text, self.ranks) if pairs else None
        self[token] = found = tuple(self.ids[part] for part in last or ())
        return found


def _last_merge(text: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
    """The last of BPE's merges of a text; None if they do not make it one token."""
    pieces = list(text)
    while len(pieces) > 2:
        rank, first = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(pieces)))
        if rank == len(ranks):
            return None
        pieces[first : first + 2] = ["".join(pieces[first : first + 2])]
    return (pieces[0], pieces[1]) if tuple(pieces) in ranks else None


def _special_ids(config: Mapping[str, Any], rows: int) -> set[int]:
    """The token ids in a configuration, such as `eos_token_id`; a value outside the vocabulary stands for none."""
    values = [value for name, value in config.items() if name.endswith("_token_id")]
    flat = [index for value in values for index in (value if isinstance(value, list) else [value])]
    return {index for index in flat if isinstance(index, int) and 0 <= index < rows}


def _processor_places(state: dict[str, Any]) -> Iterator[tuple[list[Any], int]]:
    """Where a post-processor's JSON has ids, as lists and indices: a template's special tokens, BERT's `sep`, `cls`."""
    processor = state.get("post_processor") or {}
    for step in [processor, *processor.get("processors", [])]:
        for token in (step.get("special_tokens") or {}).values():
            yield from ((token["ids"], place) for place in range(len(token["ids"])))
        yield from ((step[name], 1) for name in ("sep", "cls") if name in step)


def _chat_ids(tokenizer: Any, shown: Any) -> set[int]:
    """The tokens of the chat template's own words, as they stand in the template and in a few chats.

    A template may refuse a chat, such as one with a system message. Its words stay all the same.
    """
    found: set[int] = set()
    for words in _template_words(tokenizer.chat_template, shown):
        found.update(tokenizer.encode(words, add_special_tokens=False))
    for roles in _CHATS if tokenizer.chat_template else ():
        messages = [{"role": role, "content": "a"} for role in roles]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=roles[-1] == "user")
        except Exception:  # it may refuse a role
            continue
        found.update(tokenizer.encode(text, add_special_tokens=False))
    return found


def _template_words(template: str | dict[str, str] | None, shown: Any) -> Iterator[str]:
    """The texts in a chat template, or in several by name: what it writes as it stands, and its strings."""
    syntax = Environment(trim_blocks=True, lstrip_blocks=True)  # as in transformers
    for source in template.values() if isinstance(template, dict) else [template or ""]:
        try:
            yield from (token.value for token in syntax.lexer.tokenize(source) if token.type in ("data", "string"))
        except TemplateSyntaxError as error:
            raise InputError(f"{shown}: chat template: {one_line(error)}; allowed: a Jinja template, or none") from None


@without_gc()
def trim_tokenizer(checkpoint: Path, kept: Sequence[int], shares: Sequence[float], out: Path) -> None:
    """Write a dense checkpoint's tokenizer with the kept tokens alone, and the table of both ids.

    `kept` are ids, ascending, with all that they are made of; the new ones are 0, 1, 2, … `shares` are of the counted
    tokens, by id. A text of kept tokens is written in the same ones: BPE takes the same merges in the same order.
    Raises InputError as `tokens_of`, and if transformers does not load the trimmed tokenizer as it was written.
    """
    tokenizer = load_tokenizer(checkpoint)
    state = _state(tokenizer, checkpoint)
    new = {old: index for index, old in enumerate(kept)}
    trimmed, texts = _trimmed(state, new), _texts(state, int(read_config(checkpoint)["vocab_size"]))
    tokenizer.save_pretrained(out)
    (out / "tokenizer.json").write_text(json.dumps(trimmed, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    backend = Tokenizer.from_str(json.dumps(trimmed))
    loaded = json.loads(load_tokenizer(out).backend_tokenizer.to_str())
    if any(loaded[part] != json.loads(backend.to_str())[part] for part in ("model", "added_tokens")):
        raise InputError(f"{checkpoint}: tokenizer: transformers does not load it trimmed; allowed: without vocabulary")
    write_id_table(out, texts, new, backend, shares)


def _trimmed(state: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    model = state["model"]
    vocab = {text: new[index] for text, index in model["vocab"].items() if index in new}
    merges = [[left, right] for left, right in model["merges"] if is_kept(left, right, vocab)]
    added = [token | {"id": new[token["id"]]} for token in state["added_tokens"] if token["id"] in new]
    state = json.loads(json.dumps(state | {"model": model | {"vocab": vocab, "merges": merges}, "added_tokens": added}))
    for ids, place in _processor_places(state):
        ids[place] = new[ids[place]]
    if state.get("padding"):
        state["padding"]["pad_id"] = new[state["padding"]["pad_id"]]
    return state


def is_kept(left: str, right: str, tokens: Container[str]) -> bool:
    """Whether a merge is one of a trimmed tokenizer: its two parts and its result are tokens."""
    return left in tokens and right in tokens and left + right in tokens


def renumbered(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A configuration with the new ids of its special tokens, and the new size if it states one."""
    new = {old: index for index, old in enumerate(kept)}
    sizes = ("vocab_size", "vocab_size_per_layer_input")
    changed: dict[str, Any] = dict.fromkeys((name for name in sizes if name in config), len(kept))
    for name, value in config.items():
        if name.endswith("_token_id"):
            changed[name] = [new.get(i, i) for i in value] if isinstance(value, list) else new.get(value, value)
    return {**config, **changed}


def renumber_generation(checkpoint: Path, kept: Sequence[int], out: Path) -> None:
    """Write `generation_config.json` with new ids, if there is one; lists of forbidden tokens are dropped."""
    if fields := _generation(checkpoint):
        for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids"):
            fields.pop(name, None)
        text = json.dumps(renumbered(fields, kept), indent=2, ensure_ascii=False)
        (out / _GENERATION).write_text(text + "\n", encoding="utf-8")


def _generation(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / _GENERATION
    return {**json.loads(file.read_text(encoding="utf-8"))} if file.is_file() else {}
