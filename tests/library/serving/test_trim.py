"""A trimmed file computes what the whole one computes of the tokens that stay; what cannot be trimmed is refused."""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGMLQuantizationType
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from helpers import bpe_tokenizer, save_worded_llama, spm_tokenizer, words
from llama_cpp import llama_cpp
from tailored_llama.errors import InputError
from tailored_llama.models import load_gguf_tokenizer, load_model, load_tokenizer, open_gguf, read_config, read_id_table
from tailored_llama.serving import trim_checkpoint, trim_gguf, write_gguf

TEXT = [words(2000, seed=2)]
TEXTS = [
    words(300, seed=1),
    "Hello,  world!\n\n\tTabs",
    "Größe 3,14 — naïve café, 日本語, 🤗🏽 and \u200b",
    " leading",
    "a",
]
TOKENIZERS: dict[str, Callable[[], Any]] = {"byte-level": bpe_tokenizer, "SentencePiece": spm_tokenizer}
SIZES = {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 16, "intermediate_size": 256}
Values = dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]


def values_of(file: Path) -> Values:
    """The metadata of a file, with their types."""
    fields = GGUFReader(file).fields.items()
    named = {name: (field.contents(), field.types[0], field.types[-1]) for name, field in fields}
    return {
        name: (value, kind, item if kind == GGUFValueType.ARRAY else None)
        for name, (value, kind, item) in named.items()
        if not name.startswith("GGUF.")
    }


def bytes_of(file: Path) -> dict[str, tuple[GGMLQuantizationType, Any]]:
    return {t.name: (t.tensor_type, t.data.view(np.uint8)) for t in GGUFReader(file).tensors}


def write_file(out: Path, values: Values, tensors: dict[str, tuple[GGMLQuantizationType, Any]]) -> Path:
    writer = GGUFWriter(out, "llama")
    for name, (value, kind, item) in values.items():
        if name != "general.architecture":
            writer.add_key_value(name, value, kind, item)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def changed(file: Path, out: Path, **changes: Any) -> Path:
    """A copy with other metadata, without those that are None; underscores stand for `tokenizer.ggml.`"""
    values = values_of(file)
    for short, value in changes.items():
        name = short.replace("ggml_", "tokenizer.ggml.", 1) if short.startswith("ggml_") else short.replace("__", ".")
        if value is None:
            values.pop(name)
        elif isinstance(value, list):
            values[name] = (value, GGUFValueType.ARRAY, GGUFValueType.get_type(value[0]))
        else:
            values[name] = (value, values[name][1] if name in values else GGUFValueType.get_type(value), None)
    return write_file(out, values, bytes_of(file))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """GGUF files of tiny models, each written once."""
    root, written = tmp_path_factory.mktemp("files"), dict[str, Path]()

    def make(tokenizer: str = "byte-level", gguf_type: Any = "q8_0", tied: bool = True) -> Path:
        name = f"{tokenizer}-{gguf_type}-{tied}"
        if name not in written:
            folder = root / f"{tokenizer}-{tied}"
            if not folder.exists():
                sizes = SIZES | {"tie_word_embeddings": tied, "num_hidden_layers": 2}
                save_worded_llama(folder, TOKENIZERS[tokenizer](), noise=0.1, **sizes)
            write_gguf(folder, gguf_type=gguf_type, out=root / f"{name}.gguf")
            written[name] = root / f"{name}.gguf"
        return written[name]

    return make


def kept_ids(before: Path, after: Path) -> list[int]:
    """The ids, in a file, of the tokens of its trimmed copy."""
    ids = {text: index for index, text in enumerate(values_of(before)["tokenizer.ggml.tokens"][0])}
    return [ids[text] for text in values_of(after)["tokenizer.ggml.tokens"][0]]


@pytest.mark.parametrize(
    ("tokenizer", "tied", "gguf_type"),
    [("byte-level", False, own) for own in ("f32", "f16", "bf16", "q8_0", "q5_1", "q4_0", "q4_k_m", "q6_k")]
    + [("SentencePiece", True, "q8_0"), ("SentencePiece", False, "q4_k_m"), ("byte-level", True, "q6_k")],
)
def test_logits_of_kept_tokens_are_equal_to_the_bit(
    files: Callable[..., Path], tmp_path: Path, tokenizer: str, tied: bool, gguf_type: str
) -> None:
    dense, small = files(tokenizer, gguf_type, tied), tmp_path / "small.gguf"
    trimmed = trim_gguf(dense, TEXT, 512, small)
    assert trimmed.tokens == (len(values_of(dense)["tokenizer.ggml.tokens"][0]), 512)
    assert trimmed.bytes == (dense.stat().st_size, small.stat().st_size)
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]
    kept, before, after = kept_ids(dense, small), bytes_of(dense), bytes_of(small)
    assert list(before) == list(after)
    for name, (kind, data) in after.items():
        rows = name in ("token_embd.weight", "output.weight")
        assert kind == before[name][0]
        assert np.array_equal(data, before[name][1][kept] if rows else before[name][1]), name
    ids = list(range(300, 330))
    with llama_cpp(dense) as whole, llama_cpp(small) as part:
        assert torch.equal(part.logits(ids), whole.logits([kept[i] for i in ids])[:, kept])


@pytest.mark.parametrize(("tokenizer", "types"), [("byte-level", True), ("SentencePiece", True), ("byte-level", False)])
def test_kept_texts_have_the_same_tokens_in_llama_cpp_and_all_texts_come_back(
    files: Callable[..., Path], tmp_path: Path, tokenizer: str, types: bool
) -> None:
    dense, small = files(tokenizer), tmp_path / "small.gguf"
    (folder := tmp_path / "folder").mkdir()
    if not types:
        dense = changed(dense, tmp_path / "untyped.gguf", ggml_token_type=None)
    trim_gguf(dense, TEXT, 448, small)
    trim_checkpoint(files(tokenizer).parent / f"{tokenizer}-True", TEXT, 448, folder)
    if tokenizer == "byte-level":
        assert {"<|end|>", "<|user|>", "<name>"} < set(values_of(small)["tokenizer.ggml.tokens"][0])
    kept, own = kept_ids(dense, small), load_tokenizer(folder)
    new = {old: index for index, old in enumerate(kept)}
    same = other = 0
    with llama_cpp(dense, 1024) as whole, llama_cpp(small, 1024) as part:
        for text in [*TEXTS, *TEXT[0].split(" ")[:300]]:
            before, after = whole.tokens(text), part.tokens(text)
            assert after == own(text)["input_ids"], text
            if new.keys() >= set(before):
                assert after == [new[index] for index in before], text
                same += 1
            else:
                assert part.model.detokenize(after) == whole.model.detokenize(before), text
                other += 1
    assert min(same, other) > 0


def test_special_tokens_template_and_their_ids_stay(files: Callable[..., Path], tmp_path: Path) -> None:
    template = "{% for m in messages %}<|user|>zebra said: {{ m['content'] }}<|end|>{% endfor %}"
    more = {"tokenizer__chat_template": template, "ggml_eot_token_id": 1, "ggml_middle_token_id": 650}
    dense = changed(files(), tmp_path / "dense.gguf", **more, tokenizer__huggingface__json="{}")
    trim_gguf(dense, TEXT, 384, tmp_path / "small.gguf")
    before, after = values_of(dense), values_of(tmp_path / "small.gguf")
    assert before.keys() - after.keys() == {"tokenizer.huggingface.json"}  # which would be of the whole vocabulary
    assert after.keys() <= before.keys()
    tokens = {name: values["tokenizer.ggml.tokens"][0] for name, values in (("before", before), ("after", after))}
    for name, (value, *kind) in after.items():
        assert kind == list(before[name][1:])
        if name.endswith("_token_id"):
            assert tokens["after"][value] == tokens["before"][before[name][0]]
        elif not name.startswith("tokenizer.ggml.") and name != "llama.vocab_size":
            assert value == before[name][0]
    assert after["llama.vocab_size"][0] == 384
    assert {"<|end|>", "<|user|>", "<name>"} < set(tokens["after"])
    types = {
        name: dict(zip(tokens[name], v["tokenizer.ggml.token_type"][0], strict=True))
        for name, v in (("before", before), ("after", after))
    }
    assert types["after"] == {text: types["before"][text] for text in tokens["after"]}
    old, new = (load_gguf_tokenizer(file, open_gguf(file, ""), "") for file in (dense, tmp_path / "small.gguf"))
    assert new.tokenize("zebra said: a") == old.tokenize("zebra said: a")


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_tokens_that_hold_a_place_leave_a_file(tmp_path: Path, tokenizer: str) -> None:
    own = TOKENIZERS[tokenizer]()
    own.add_tokens(["<unused0>", "<|tool|>"], special_tokens=True)
    dense = save_worded_llama(tmp_path / "dense", own, num_hidden_layers=2, **SIZES)
    write_gguf(dense, gguf_type="q8_0", out=tmp_path / "dense.gguf")
    trim_gguf(tmp_path / "dense.gguf", TEXT, 384, tmp_path / "small.gguf")
    left = values_of(tmp_path / "small.gguf")["tokenizer.ggml.tokens"][0]
    assert "<|tool|>" in left
    assert "<unused0>" not in left


@pytest.mark.usefixtures("all_general_words")
def test_without_a_number_the_texts_stay_whole_and_what_general_text_uses(
    files: Callable[..., Path], tmp_path: Path
) -> None:
    few = trim_gguf(files(), ["a"], None, tmp_path / "few.gguf")
    many = trim_gguf(files(), [words(300, seed=2)], None, tmp_path / "many.gguf")
    assert 320 < few.tokens[1] < many.tokens[1] < 704
    assert few.whole == many.whole == pytest.approx(1)
    some = trim_gguf(files(), TEXT, 384, tmp_path / "some.gguf")
    assert some.whole < 1
    assert len(some.gone) == 8
    tokenizer = load_gguf_tokenizer(tmp_path / "some.gguf", open_gguf(tmp_path / "some.gguf", ""), "")
    assert all(len(tokenizer.tokenize(text)) > 1 for text in some.gone)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_folder_loses_the_same_tokens_and_nothing_else(tmp_path: Path, tokenizer: str, tied: bool) -> None:
    dense = save_worded_llama(tmp_path / "dense", TOKENIZERS[tokenizer](), noise=0.1, tie_word_embeddings=tied)
    (dense / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (small := tmp_path / "small").mkdir()
    trimmed = trim_checkpoint(dense, TEXT, 512, small)
    assert trimmed.tokens[1] == read_config(small)["vocab_size"] == len(load_tokenizer(small)) == 512
    table = read_id_table(small)
    assert table
    kept = sorted(table.kept)
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, small))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        rows = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(tensor, before[name][kept] if rows else before[name]), name
    ids = torch.tensor([list(range(300, 330))])
    with torch.no_grad():
        expected = load_model(dense)(torch.tensor([[kept[i] for i in ids[0]]])).logits[..., kept]
        torch.testing.assert_close(load_model(small)(ids).logits, expected)
    assert "license: apache-2.0" in (small / "README.md").read_text()
    write_gguf(dense, gguf_type="f16", out=tmp_path / "dense.gguf")
    trim_gguf(tmp_path / "dense.gguf", TEXT, 512, tmp_path / "small.gguf")
    write_gguf(small, gguf_type="f16", out=tmp_path / "again.gguf", name="dense")
    assert kept_ids(tmp_path / "dense.gguf", tmp_path / "small.gguf") == kept
    again, own = bytes_of(tmp_path / "again.gguf"), bytes_of(tmp_path / "small.gguf")
    assert all(np.array_equal(data, again[name][1]) for name, (_, data) in own.items())


TOKENS = 704
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"ggml_model": "bert"}, "tokenizer.ggml.model: got bert; allowed: gpt2 (byte-level BPE) or llama (Sent"),
    "no tokenizer": ({"ggml_model": None}, "tokenizer.ggml.model: got None; allowed: gpt2 (byte-level BPE)"),
    "no tokens": ({"ggml_tokens": None}, "tokenizer.ggml.tokens: got none; allowed: a list of texts"),
    "scores": ({"ggml_scores": [0.5] * 5}, "tokenizer.ggml.scores: got 5 values; allowed: 704 values, one for each of"),
    "types": ({"ggml_token_type": [1] * 3}, "tokenizer.ggml.token_type: got 3 values; allowed: 704 values, one for"),
    "size": (
        {"llama__vocab_size": 700},
        "llama.vocab_size: got 700; allowed: 704, the length of tokenizer.ggml.tokens",
    ),
    "id": ({"ggml_eos_token_id": 704}, "tokenizer.ggml.eos_token_id: got 704; allowed: 0 to 703, the id of a token"),
    "id as text": ({"ggml_eom_token_id": "x"}, "tokenizer.ggml.eom_token_id: got x; allowed: 0 to 703, the id of a"),
    "merge of three": ({"ggml_merges": ["a b c"]}, "tokenizer.ggml.merges: got 'a b c'; allowed: two texts with a"),
    "merges as numbers": ({"ggml_merges": [1, 2]}, "tokenizer.ggml.merges: got 1; allowed: two texts with a space"),
    "merge of no tokens": ({"ggml_merges": ["no token"]}, "tokenizer cannot be loaded ("),
    "a part": ({"split__count": 3}, "split.count: got 3; allowed: 1; llama-gguf-split --merge joins the parts of a"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_metadata_that_disagree_are_refused(files: Callable[..., Path], tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    bad = changed(files(), tmp_path / "bad.gguf", **changes)
    with pytest.raises(InputError, match=re.escape(f"{bad}: {message}")) as caught:
        trim_gguf(bad, TEXT, 512, tmp_path / "out.gguf")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def test_tensors_that_disagree_are_refused(files: Callable[..., Path], tmp_path: Path) -> None:
    tensors, values = bytes_of(files()), values_of(files())
    kind, data = tensors.pop("token_embd.weight")
    write_file(tmp_path / "none.gguf", values, tensors)
    write_file(tmp_path / "few.gguf", values, {**tensors, "token_embd.weight": (kind, data[:9])})
    write_file(
        tmp_path / "head.gguf",
        values,
        {**tensors, "token_embd.weight": (kind, data), "output.weight": (kind, data[:9])},
    )
    for name, message in {
        "none": "token_embd.weight: got no such tensor; allowed: a language model",
        "few": "token_embd.weight: got 9 rows; allowed: 704, one for each of tokenizer.ggml.tokens",
        "head": "output.weight: got 9 rows; allowed: 704",
    }.items():
        with pytest.raises(InputError, match=re.escape(f"{name}.gguf: {message}")):
            trim_gguf(tmp_path / f"{name}.gguf", TEXT, 512, tmp_path / "out.gguf")


def test_a_file_cut_anywhere_is_refused(files: Callable[..., Path], tmp_path: Path) -> None:
    whole, cut = files().read_bytes(), tmp_path / "cut.gguf"
    for length in {0, 3, 20, 100, *np.linspace(200, len(whole) - 40, 20).astype(int)}:
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut.gguf: not a complete GGUF file"):
            trim_gguf(cut, TEXT, 512, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_a_length_that_the_file_cannot_hold_is_refused(files: Callable[..., Path], tmp_path: Path) -> None:
    whole = bytearray(files().read_bytes())
    at = whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    assert struct.unpack_from("<Q", whole, at) == (TOKENS,)
    for length in (2**63, 2**40, TOKENS + 1):
        struct.pack_into("<Q", whole, at, length)
        (tmp_path / "long.gguf").write_bytes(whole)
        with pytest.raises(InputError, match=r"long.gguf: not a complete GGUF file"):
            trim_gguf(tmp_path / "long.gguf", TEXT, 512, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (500, "tokens: got 500; allowed: a multiple of 64 up to 640, as the model has 704"),
        (704, "tokens: got 704; allowed: a multiple of 64 up to 640"),
        (64, "tokens: got 64; allowed: at least 320, for bytes, special tokens and chat template"),
    ],
)
def test_a_number_of_tokens_that_cannot_be_is_refused(
    files: Callable[..., Path], tmp_path: Path, size: int, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        trim_gguf(files(), TEXT, size, tmp_path / "out.gguf")


def test_texts_that_need_every_token_are_refused(files: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = bpe_tokenizer()
    every = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    with pytest.raises(InputError, match=r"tokens: not set, and the texts need 7.*; allowed: a multiple of 64"):
        trim_gguf(files(), every, None, tmp_path / "out.gguf")


def test_a_failed_write_leaves_nothing(files: Callable[..., Path], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert (tmp_path / "out.gguf.part").is_file()
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trim_gguf(files(), TEXT, 512, tmp_path / "out.gguf", stop)
    assert not list(tmp_path.iterdir())
