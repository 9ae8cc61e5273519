"""A trimmed tokenizer writes every text, and texts of kept tokens as before; what cannot be trimmed is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from helpers import bpe_tokenizer, save_worded_llama, spm_tokenizer, words
from tailored_llama.errors import InputError
from tailored_llama.models import load_tokenizer, read_id_table, read_tokens, renumber_generation, trim_tokenizer
from tailored_llama.models.vocabulary import _last_merge
from tailored_llama.pruning.vocabulary import choose_tokens

TEXTS = [
    words(300, seed=1),
    "Hello,  world!\n\n\tTabs and   spaces ",
    "Größe 3,14 — naïve café, 日本語, 🤗🏽 and \u200b",
    "<|user|> and <name> and <|end|>",
    " leading",
    "",
]


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that takes whole words without merges, with a template in a sequence of post-processors."""
    tokenizer = bpe_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["ignore_merges"] = True
    backend = Tokenizer.from_str(json.dumps(state))
    around = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 1)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), around])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|user|>")


def of_class(kind: Any, trained: PreTrainedTokenizerFast, **special: str) -> Any:
    """A tokenizer of one of transformers' own classes, which build their parts themselves."""
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    return kind(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **special)


END = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|end|>")
KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": bpe_tokenizer,
    "byte fallback": spm_tokenizer,
    "as Llama 3's": llama3_tokenizer,
    "LlamaTokenizer": lambda: of_class(LlamaTokenizer, spm_tokenizer()),
    "Qwen2Tokenizer": lambda: of_class(Qwen2Tokenizer, bpe_tokenizer(), **END),
}


@pytest.fixture(scope="module", params=KINDS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_worded_llama(tmp_path_factory.mktemp("worded"), KINDS[request.param]())


def shares_of(checkpoint: Path, text: str) -> Any:
    tokenizer, rows = load_tokenizer(checkpoint), read_tokens(checkpoint).rows
    counts = np.bincount(tokenizer(text, add_special_tokens=False)["input_ids"], minlength=rows)
    return counts / counts.sum()


def trim(checkpoint: Path, out: Path, size: int) -> list[int]:
    out.mkdir()
    shares = shares_of(checkpoint, words(2000, seed=2))
    kept = choose_tokens(read_tokens(checkpoint), shares, size).kept
    trim_tokenizer(checkpoint, kept, shares.tolist(), out)
    return list(kept)


@pytest.mark.parametrize("size", [384, 512, 640])
def test_any_text_is_encoded_and_decoded_exactly(dense: Path, tmp_path: Path, size: int) -> None:
    trim(dense, tmp_path / "trimmed", size)
    before, after = load_tokenizer(dense), load_tokenizer(tmp_path / "trimmed")
    assert len(after) == size
    for text in TEXTS:
        ids = after(text, add_special_tokens=False)["input_ids"]
        assert max(ids, default=0) < size
        assert after.decode(ids) == before.decode(before(text, add_special_tokens=False)["input_ids"]), text


@pytest.mark.parametrize("size", [384, 512, 640])
def test_texts_of_kept_tokens_are_encoded_as_before(dense: Path, tmp_path: Path, size: int) -> None:
    kept = trim(dense, tmp_path / "trimmed", size)
    before, after = load_tokenizer(dense), load_tokenizer(tmp_path / "trimmed")
    new = {old: index for index, old in enumerate(kept)}
    same = other = 0
    for text in [*TEXTS, *words(3000, seed=3).replace("\n", " ").split(" ")]:
        ids = before(text)["input_ids"]
        if new.keys() >= set(ids):
            assert after(text)["input_ids"] == [new[index] for index in ids], text
            same += 1
        else:
            other += 1
    assert min(same, other) > 0


def test_special_tokens_and_template_words_stay_and_have_their_new_ids(tmp_path: Path) -> None:
    dense = save_worded_llama(tmp_path / "dense")
    trim(dense, tmp_path / "trimmed", 384)
    before, after = load_tokenizer(dense), load_tokenizer(tmp_path / "trimmed")
    assert after.chat_template == before.chat_template
    for name in ("<|end|>", "<|user|>", "<name>"):
        assert after.encode(name, add_special_tokens=False) == [after.convert_tokens_to_ids(name)]
    assert after.eos_token_id == after.convert_tokens_to_ids("<|end|>")
    assert after.tokenize("<|user|>user said") == before.tokenize("<|user|>user said")


@pytest.mark.parametrize("tokenizer_of", [bpe_tokenizer, spm_tokenizer])
def test_tokens_that_hold_a_place_stay_only_for_texts_that_have_them(
    tmp_path: Path, tokenizer_of: Callable[[], Any]
) -> None:
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["<unused0>", "<unused1>", "<|reserved_special_token_7|>", "<|tool|>"], special_tokens=True)
    dense = save_worded_llama(tmp_path / "dense", tokenizer)
    kept = choose_tokens(read_tokens(dense), shares_of(dense, words(2000, seed=2) + 50 * " <unused1>"), 384).kept
    (out := tmp_path / "trimmed").mkdir()
    trim_tokenizer(dense, kept, np.zeros(len(tokenizer)).tolist(), out)
    trimmed = load_tokenizer(out)
    assert {"<unused1>", "<|tool|>"} <= trimmed.get_vocab().keys()
    assert not {"<unused0>", "<|reserved_special_token_7|>"} & trimmed.get_vocab().keys()
    assert trimmed.decode(trimmed.encode("a <unused0>", add_special_tokens=False)) == "a <unused0>"


def test_the_words_of_a_template_that_refuses_chats_stay(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    written, quoted = sorted(tokenizer.get_vocab().values(), key=lambda token: len(tokenizer.decode([token])))[-2:]
    words, string = tokenizer.decode([written]), repr(tokenizer.decode([quoted]))
    tokenizer.chat_template = f"{{{{ raise_exception('no') }}}}{{% if tools %}}.{words}{{{{ {string} }}}}{{% endif %}}"
    dense = save_worded_llama(tmp_path / "dense", tokenizer)
    assert {written, quoted} <= read_tokens(dense).always


def test_a_template_that_is_none_is_refused(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = "{{ 'open"
    dense = save_worded_llama(tmp_path / "dense", tokenizer)
    with pytest.raises(InputError, match=f"^{dense}: chat template: .*; allowed: a Jinja template, or none$"):
        read_tokens(dense)


def test_what_only_generation_names_and_what_bytes_cannot_write_stays(tmp_path: Path) -> None:
    dense = save_worded_llama(tmp_path / "dense", vocab_size=768)
    longest = max(read_tokens(dense).texts)
    (dense / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, longest - 1]}))
    file = dense / "tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["vocab"]["no byte"] = longest + 1
    file.write_text(json.dumps(state))
    kept = trim(dense, tmp_path / "trimmed", 384)
    assert {longest - 1, longest + 1} <= set(kept)
    renumber_generation(dense, kept, tmp_path / "trimmed")
    stated = json.loads((tmp_path / "trimmed" / "generation_config.json").read_text())
    assert stated == {"eos_token_id": [kept.index(0), kept.index(longest - 1)]}


@pytest.mark.parametrize("tokenizer_of", [spm_tokenizer, llama3_tokenizer])
def test_a_template_around_every_text_has_its_new_ids(tmp_path: Path, tokenizer_of: Callable[[], Any]) -> None:
    dense = save_worded_llama(tmp_path / "dense", tokenizer_of())
    kept = trim(dense, tmp_path / "trimmed", 384)
    tokenizer = load_tokenizer(tmp_path / "trimmed")
    assert tokenizer("a")["input_ids"][0] == kept.index(1) == tokenizer.bos_token_id


def test_the_table_writes_every_token_in_the_pieces_of_the_trimmed_tokenizer(dense: Path, tmp_path: Path) -> None:
    kept = trim(dense, tmp_path / "trimmed", 448)
    table, texts = read_id_table(tmp_path / "trimmed"), read_tokens(dense).texts
    assert table
    assert table.kept == set(kept)
    new = {index: text for text, index in load_tokenizer(tmp_path / "trimmed").get_vocab().items()}
    for token, pieces in table.pieces.items():
        written = "".join(new[piece] for piece in pieces)
        assert written == texts[token] or all(new[piece].startswith("<0x") for piece in pieces)
        assert (len(pieces) == 1) or token not in table.kept


def test_bpe_makes_a_token_of_other_parts_than_its_first_merge() -> None:
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("ab", "c"): 2, ("a", "bc"): 3}
    assert _last_merge("abc", ranks) == ("a", "bc")
    assert _last_merge("abd", ranks) is None


def test_choosing_follows_shares_and_fills_whole_rows(dense: Path) -> None:
    tokens, shares = read_tokens(dense), shares_of(dense, words(2000, seed=2))
    chosen = {size: set(choose_tokens(tokens, shares, size).kept) for size in (384, 512, 640)}
    assert {size: len(kept) for size, kept in chosen.items()} == {384: 384, 512: 512, 640: 640}
    for kept in chosen.values():
        assert tokens.always <= kept
        assert tokens.made_of(kept) == kept
    whole = [shares[sorted(kept)].sum() for kept in chosen.values()]
    assert whole == sorted(whole)


def test_too_few_tokens_are_refused(dense: Path) -> None:
    tokens = read_tokens(dense)
    with pytest.raises(InputError, match=r"pruning.vocabulary: got 64; allowed: at least 320, for bytes"):
        choose_tokens(tokens, np.zeros(tokens.rows), 64)


def other_tokenizer(model: Any, **fields: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = fields.get("pre_tokenizer")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[UNK]", bos_token="[UNK]")


REFUSED = {
    "Unigram": lambda: other_tokenizer(models.Unigram([("[UNK]", 0.0), ("a", -1.0)], unk_id=0)),
    "WordPiece": lambda: other_tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
    "BPE over characters": lambda: other_tokenizer(
        models.BPE({"[UNK]": 0, "a": 1}, [], unk_token="[UNK]"), pre_tokenizer=pre_tokenizers.Whitespace()
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_trimmed_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    dense = save_worded_llama(tmp_path / "dense", REFUSED[kind](), vocab_size=260)
    with pytest.raises(InputError, match=rf"tokenizer: got {kind}; allowed: byte-level BPE"):
        read_tokens(dense)


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    dense = save_worded_llama(tmp_path / "dense", vocab_size=640)
    with pytest.raises(InputError, match="has id 702; allowed: below 640"):
        read_tokens(dense)


def test_an_added_token_without_a_row_is_dropped(tmp_path: Path) -> None:
    dense = save_worded_llama(tmp_path / "dense", vocab_size=703)
    kept = trim(dense, tmp_path / "trimmed", 384)
    assert max(kept) < 703
    assert "<name>" not in load_tokenizer(tmp_path / "trimmed").get_vocab()
