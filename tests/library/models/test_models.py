"""Models: every source becomes one whole checkpoint, and nothing broken is loaded or made up."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from helpers import load_and_render, save_tiny_llama, tune, write_own_benchmark
from tailored_llama.config import BenchmarkConfig, Dtype, ModelConfig, TuningConfig, Work
from tailored_llama.errors import InputError
from tailored_llama.evaluation import WrittenAnswer, generate
from tailored_llama.models import (
    DenseSettings,
    carry_adapter,
    find_model,
    load_model,
    load_tokenizer,
    merge_adapter,
    pick_device,
    prepare_dense,
    read_structure,
)
from tailored_llama.models.checkpoints import weights_digest
from tailored_llama.models.convert import _convert
from tailored_llama.models.families import ALLOWED
from tailored_llama.pipeline.graph import as_json
from tailored_llama.pruning.surgery import prune_checkpoint
from tailored_llama.pruning.vocabulary import VocabularyPlan

IDS = torch.arange(1, 25)[None]


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$".replace(r"\*", ".*")


def convert(source: Path, out: Path, dtype: Dtype = "float32") -> dict[str, Any]:
    model = ModelConfig(source=str(source), dtype=dtype)
    return prepare_dense(settings=DenseSettings.of(model), work=Work(out, downloads="no downloads"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(IDS).logits)


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def shard(folder: Path) -> None:
    """Split the weights over two files with an index, as large checkpoints have it."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: weights[name] for name in members}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The dense checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the dense checkpoint that changes its logits."""
    work = tmp_path_factory.mktemp("tuning")
    out = work / "adapter"
    out.mkdir()
    prompts = load_and_render(BenchmarkConfig(**write_own_benchmark(work)), work, split="train", shots=8, held_out=4)
    tune(tiny, prompts, TuningConfig(epochs=2, learning_rate=2e-2), out)
    return out


def test_a_folder_becomes_a_checkpoint_with_the_same_logits(tiny: Path, folder: Callable[[str], Path]) -> None:
    out = folder("out")
    facts = convert(tiny, out)
    assert facts == {"parameters": sum(p.numel() for p in stock(tiny).parameters())}
    assert torch.equal(logits(stock(out)), logits(stock(tiny)))
    assert load_tokenizer(out)("blue sky")["input_ids"] == load_tokenizer(tiny)("blue sky")["input_ids"]


def test_weights_are_kept_in_the_asked_type(tiny: Path, folder: Callable[[str], Path]) -> None:
    out = folder("out")
    convert(tiny, out, "bfloat16")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert load_model(out).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copying_tensor_by_tensor_writes_what_loading_and_saving_does(
    copy: Path, folder: Callable[[str], Path], dtype: Dtype
) -> None:
    copied, saved = folder("copied"), folder("saved")
    kept = {"eos_token_id": [256, 7], "temperature": 0.5}
    (copy / "generation_config.json").write_text(json.dumps(kept | {"repetition_penalty": 1.1}))
    convert(copy, copied, dtype)
    _convert(copy, getattr(torch, dtype), saved, "the model")
    (copied / "README.md").unlink()  # written in both cases
    greedy = json.loads((copied / "generation_config.json").read_text())
    assert greedy == kept  # a server with a penalty would answer otherwise than the model is scored
    (saved / "generation_config.json").write_bytes((copied / "generation_config.json").read_bytes())
    assert sorted(file.name for file in copied.iterdir()) == sorted(file.name for file in saved.iterdir())
    for file in saved.iterdir():
        if file.suffix == ".safetensors":
            ours, theirs = load_file(copied / file.name), load_file(file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        else:
            assert (copied / file.name).read_bytes() == file.read_bytes()


def test_weights_of_the_asked_type_are_linked_not_copied(copy: Path, folder: Callable[[str], Path]) -> None:
    shard(copy)
    linked, cast = folder("linked"), folder("cast")
    convert(copy, linked)
    for file in copy.glob("model*"):
        assert (linked / file.name).samefile(file)
    convert(copy, cast, "float16")
    assert not any((cast / file.name).exists() for file in copy.glob("model-*"))
    assert torch.equal(logits(load_model(linked)), logits(load_model(copy)))


def test_shards_are_one_checkpoint(copy: Path, tiny: Path, folder: Callable[[str], Path]) -> None:
    shard(copy)
    out = folder("out")
    convert(copy, out)
    assert torch.equal(logits(load_model(out)), logits(load_model(tiny)))
    assert torch.equal(logits(load_model(copy)), logits(load_model(tiny)))


def test_identity_is_the_bytes_not_the_place(tiny: Path, copy: Path) -> None:
    def identity(path: Path) -> dict[str, Any]:
        return find_model(ModelConfig(source=str(path))).identity()

    assert identity(copy) == identity(tiny)
    (copy / "README.md").write_text("words about it")
    assert identity(copy) == identity(tiny)
    edit_weights(copy, lambda weights: weights["model.norm.weight"].mul_(2))
    assert identity(copy) != identity(tiny)
    commit = "8416d3fefb0cb3ff5775a7b13c1692d10ff1aa16"
    hub = ModelConfig(source="huggyllama/llama-7b", revision=commit)
    assert find_model(hub).identity() == {"hub": "huggyllama/llama-7b", "commit": commit}


def test_no_file_names_a_place_on_this_machine(
    tiny: Path, adapter: Path, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    dense, merged = folder("dense"), folder("merged")
    convert(tiny, dense)
    merge_adapter(tiny, adapter, out=merged)
    places = [str(place).encode() for place in (tmp_path, tiny.parent, adapter.parent, Path.home(), Path.cwd())]
    for file in (f for out in (dense, merged, adapter) for f in out.rglob("*") if f.is_file()):
        assert not [place for place in places if place in file.read_bytes()], file


# Broken checkpoints


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def replace(folder: Path, old: bytes, new: bytes) -> None:
    """Replace the first such bytes of the header by as many others."""
    file = folder / "model.safetensors"
    assert old in file.read_bytes()[:20_000]
    file.write_bytes(file.read_bytes().replace(old, new, 1))


def pickled(folder: Path) -> None:
    torch.save({"model.embed_tokens.weight": torch.ones(260, 32)}, folder / "model.safetensors")


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-2.safetensors").unlink()


def index(text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        shard(folder)
        (folder / "model.safetensors.index.json").write_text(text)

    return edit


ALL_WEIGHTS = "allowed: a checkpoint with all of its weights"
NOT_WHOLE = "{0}/model.safetensors: not a whole safetensors file (Error while deserializing header: "
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut": (
        lambda folder: truncate(folder / "model.safetensors", 100_000),
        f"{NOT_WHOLE}incomplete metadata, file not fully covered)",
    ),
    "header cut": (lambda folder: truncate(folder / "model.safetensors", 100), f"{NOT_WHOLE}invalid header length)"),
    "weights empty": (lambda folder: truncate(folder / "model.safetensors", 0), f"{NOT_WHOLE}header too small)"),
    "header garbage": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" + b"\x00" * 7 + b"not json, though!"),
        f"{NOT_WHOLE}invalid JSON in header: *)",
    ),
    "pickle only": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "{0}: model.safetensors is missing; allowed: a checkpoint in safetensors",
    ),
    "shard missing": (missing_shard, "{0}: model-2.safetensors is missing; allowed: a checkpoint in safetensors"),
    "index garbage": (index("{"), "{0}/model.safetensors.index.json: not a safetensors index"),
    "index a list": (index("[]"), "{0}/model.safetensors.index.json: not a safetensors index"),
    "index empty": (index('{"weight_map": {}}'), "{0}/model.safetensors.index.json: not a safetensors index"),
    "index of numbers": (
        index('{"weight_map": {"a": 5}}'),
        "{0}/model.safetensors.index.json: not a safetensors index",
    ),
    "index elsewhere": (
        index('{"weight_map": {"a": "../x.safetensors"}}'),
        "{0}/model.safetensors.index.json: not a safetensors index",
    ),
    "config missing": (
        lambda folder: (folder / "config.json").unlink(),
        "{0}/config.json: missing or not JSON; allowed: a checkpoint folder",
    ),
    "config a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "{0}/config.json: missing or not JSON; allowed: a checkpoint folder",
    ),
    "unsupported": (
        lambda folder: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)).save_pretrained(folder),
        "model.source {0}: architecture gpt2, without model.embed_tokens.weight; " + ALLOWED,
    ),
    "header of no known type": (
        lambda folder: replace(folder, b'"F32"', b'"F99"'),
        f"{NOT_WHOLE}invalid JSON in header: unknown variant `F99`, expected one of *)",
    ),
    "weights of whole numbers": (
        lambda folder: replace(folder, b'"F32"', b'"I32"'),
        "{0}/model.safetensors: tensor model.embed_tokens.weight is of type I32; allowed: F64, F32, F16, BF16",
    ),
    "header with another shape": (
        lambda folder: replace(folder, b"[260,32]", b"[261,32]"),
        f"{NOT_WHOLE}invalid shape, data type, or offset for tensor)",
    ),
    "header with an offset beyond the file": (
        lambda folder: replace(folder, b"[0,33280]", b"[0,99280]"),
        f"{NOT_WHOLE}invalid shape, data type, or offset for tensor)",
    ),
    "header with a shape below nothing": (
        lambda folder: replace(folder, b"[260,32]", b"[-60,32]"),
        f"{NOT_WHOLE}invalid JSON in header: invalid value: integer `-60`, *)",
    ),
    "header longer than the file": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}"),
        f"{NOT_WHOLE}header too large)",
    ),
    "header nested too deep": (
        lambda folder: (folder / "model.safetensors").write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5),
        f"{NOT_WHOLE}invalid JSON in header: *)",
    ),
    "a pickle by another name": (pickled, f"{NOT_WHOLE}header too large)"),
    "config with a number in words": (
        edit_config(num_attention_heads="four"),
        "{0}/config.json: num_attention_heads: got 'four'; allowed: a whole number from 1 to 260, since its weights "
        "are no larger",
    ),
    "config of a giant": (
        edit_config(intermediate_size=10**9),
        "{0}/config.json: intermediate_size: got 1000000000; allowed: a whole number from 1 to 260, since its weights "
        "are no larger",
    ),
    "config with more layers than weights": (
        edit_config(num_hidden_layers=5),
        "{0}/config.json: num_hidden_layers: got 5; allowed: a whole number from 1 to 4, since its weights are no "
        "larger",
    ),
    "no architecture": (edit_config(model_type=None), "model.source {0}: architecture None; " + ALLOWED),
    "quantized": (
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "model.source {0}: quantized weights; allowed: float32, bfloat16 or float16",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_broken_checkpoint_is_found_by_its_headers(copy: Path, damage: Callable[[Path], Any], message: str) -> None:
    message = message.format(copy)
    damage(copy)
    with pytest.raises(InputError, match=exactly(message)):
        find_model(ModelConfig(source=str(copy)))
    with pytest.raises(InputError, match=exactly(message)):
        load_model(copy)


UNFIT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensor missing": (
        lambda folder: edit_weights(folder, lambda w: w.pop("model.layers.3.mlp.up_proj.weight")),
        f"tensor model.layers.3.mlp.up_proj.weight is missing; {ALL_WEIGHTS}",
    ),
    "tensor of another shape": (
        lambda folder: edit_weights(folder, lambda w: w.update({"model.norm.weight": torch.ones(31)})),
        "tensor model.norm.weight has shape [31]; allowed: [32], as its config says",
    ),
}


@pytest.mark.parametrize(("damage", "message"), UNFIT.values(), ids=UNFIT)
def test_weights_are_never_made_up(
    copy: Path, folder: Callable[[str], Path], damage: Callable[[Path], Any], message: str
) -> None:
    damage(copy)
    out = folder("out")
    for call, where in (
        (lambda: load_model(copy), f"{copy}: "),
        (lambda: convert(copy, out), f"model.source {copy}: "),
    ):
        with pytest.raises(InputError, match=exactly(where + message)) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not list(out.iterdir())


def test_a_model_without_tokenizer_is_found_early(copy: Path, folder: Callable[[str], Path]) -> None:
    (copy / "tokenizer.json").write_text("{")
    message = f"model.source {copy}: tokenizer cannot be loaded (*"
    with pytest.raises(InputError, match=exactly(message)):
        convert(copy, folder("out"))
    (copy / "tokenizer.json").unlink()
    message = f"model.source {copy}: no tokenizer; allowed: a folder with tokenizer.json, tokenizer.model or vocab.json"
    with pytest.raises(InputError, match=exactly(message)):
        find_model(ModelConfig(source=str(copy)))


def test_a_single_file_is_preferred_to_an_index_as_transformers_does(copy: Path, tiny: Path) -> None:
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert weights_digest(copy) == weights_digest(tiny)
    assert torch.equal(logits(load_model(copy)), logits(stock(copy)))


NOWHERE = "allowed: smollm2-135m-instruct, gemma-3-270m, a folder, a .gguf file, or a Hub id (owner/name)"


@pytest.mark.parametrize(
    ("source", "message"),
    {
        "/nowhere/model": f"model.source /nowhere/model: no such file or folder; {NOWHERE}",
        "smollm3": f"model.source smollm3: no such file or folder; {NOWHERE}",
        "./models/llama": f"model.source ./models/llama: no such file or folder; {NOWHERE}",
        "/nowhere/model.gguf": "model.source /nowhere/model.gguf: no such file; allowed: a GGUF file",
    }.items(),
)
def test_a_source_that_is_nowhere(source: str, message: str) -> None:
    with pytest.raises(InputError, match=exactly(message)):
        find_model(ModelConfig(source=source))


# Adapters


@pytest.fixture
def broken_adapter(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def test_a_checkpoint_written_without_an_adapter_is_not_called_tuned(tiny: Path, folder: Callable[[str], Path]) -> None:
    out = folder("untuned")
    merge_adapter(tiny, None, out=out)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "adapter" not in card
    assert "The model has not been tuned since." in card


def test_merging_keeps_the_adapter_s_logits_in_a_stock_checkpoint(
    tiny: Path, adapter: Path, folder: Callable[[str], Path]
) -> None:
    out = folder("merged")
    merge_adapter(tiny, adapter, out=out)
    tuned = logits(PeftModel.from_pretrained(stock(tiny), adapter))
    torch.testing.assert_close(logits(stock(out)), tuned, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(load_model(tiny, adapter)), tuned, rtol=1e-4, atol=1e-4)
    assert (tuned - logits(stock(tiny))).abs().max() > 0.1
    assert load_tokenizer(out)("sky")["input_ids"] == load_tokenizer(tiny)("sky")["input_ids"]
    assert not list(out.glob("adapter*"))


def test_a_model_with_fewer_tokens_takes_the_adapter_of_the_whole_one(
    tiny: Path, adapter: Path, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    kept, trimmed, carried = (*range(0, 100, 3), 256), folder("trimmed"), folder("carried")
    prune_checkpoint(tiny, read_structure(tiny).layer, {}, trimmed, tokens=VocabularyPlan(kept, np.ones(260)))
    carry_adapter(adapter, tiny, trimmed, settings=None, work=Work(carried))
    new = torch.tensor([[3, 1, 7, 20, 5, 11]])
    with torch.no_grad():
        expected = load_model(tiny, adapter)(torch.tensor(kept)[new]).logits[..., list(kept)]
        torch.testing.assert_close(load_model(trimmed, carried)(new).logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="trained on weights"):
        carry_adapter(adapter, save_tiny_llama(tmp_path / "other", seed=1), trimmed, settings=None, work=Work(carried))


def test_an_adapter_for_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=1)
    trained = json.loads((adapter / "base.json").read_text())["weights"]
    message = f"adapter {adapter}: trained on weights {trained[:12]}, but {other} has {weights_digest(other)[:12]}"
    with pytest.raises(InputError, match=exactly(message)):
        load_model(other, adapter)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 48}, "Error(s) in loading state_dict for PeftModelForCausalLM: *"),
        ({"num_hidden_layers": 3}, "tensor base_model.model.model.layers.3.mlp.down_proj.lora_A.weight is in one of "
                                   "them only"),
        ({"num_hidden_layers": 5}, "tensor base_model.model.model.layers.4.mlp.down_proj.lora_A.weight is in one of "
                                   "them only"),
    ],
    ids=["wider", "fewer layers", "more layers"],
)  # fmt: skip
def test_a_foreign_adapter_must_fit(broken_adapter: Path, tmp_path: Path, changes: dict[str, int], reason: str) -> None:
    (broken_adapter / "base.json").unlink()  # as one that was trained elsewhere
    other = save_tiny_llama(tmp_path / "other", **changes)
    message = exactly(f"adapter {broken_adapter}: does not fit {other} ({reason})")
    with pytest.raises(InputError, match=message) as caught:
        load_model(other, broken_adapter)
    assert "\n" not in str(caught.value)


def test_a_foreign_adapter_that_fits_is_taken(tiny: Path, broken_adapter: Path, adapter: Path) -> None:
    (broken_adapter / "base.json").unlink()
    assert torch.equal(logits(load_model(tiny, broken_adapter)), logits(load_model(tiny, adapter)))


PEFT_ADAPTER = "allowed: a PEFT adapter in safetensors"
BROKEN_ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder missing": (shutil.rmtree, f"adapter {{0}}: adapter_config.json is missing; {PEFT_ADAPTER}"),
    "weights missing": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        f"adapter {{0}}: adapter_model.safetensors is missing; {PEFT_ADAPTER}",
    ),
    "weights cut": (
        lambda folder: truncate(folder / "adapter_model.safetensors", 20_000),
        "{0}/adapter_model.safetensors: not a whole safetensors file (*incomplete metadata, file not fully covered)",
    ),
    "weights garbage": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"garbage"),
        "{0}/adapter_model.safetensors: not a whole safetensors file (*)",
    ),
    "configuration garbage": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "{0}/adapter_config.json: not a PEFT configuration; allowed: a JSON object",
    ),
    "configuration a list": (
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        "{0}/adapter_config.json: not a PEFT configuration; allowed: a JSON object",
    ),
    "configuration of no known kind": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "MAGIC"}'),
        "adapter {0}: does not fit * (*)",
    ),
    "configuration of a giant": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1000000000}'),
        "{0}/adapter_config.json: r: got 1000000000; allowed: a whole number from 1 to *, since its weights are no "
        "larger",
    ),
    "weights a pickle by another name": (
        lambda folder: torch.save({"weight": torch.ones(3)}, folder / "adapter_model.safetensors"),
        "{0}/adapter_model.safetensors: not a whole safetensors file (*)",
    ),
    "base garbage": (
        lambda folder: (folder / "base.json").write_text("[]"),
        "{0}/base.json: not JSON with a field 'weights'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN_ADAPTERS.values(), ids=BROKEN_ADAPTERS)
def test_a_broken_adapter_is_refused(
    tiny: Path, broken_adapter: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(broken_adapter)
    with pytest.raises(InputError, match=exactly(message.format(broken_adapter))):
        load_model(tiny, broken_adapter)


# Use


def test_generate_continues_the_prompt_greedily(tiny: Path, adapter: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    for model in (load_model(tiny), load_model(tiny, adapter)):
        ids = tokenizer("The sky is", return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        for _ in range(6):  # without a cache
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
        assert generate(model, tokenizer, ["The sky is"], WrittenAnswer(6)) == [expected]


def test_an_empty_prompt_is_refused(tiny: Path) -> None:
    with pytest.raises(InputError, match=exactly("prompt 0: got ''; allowed: a text of at least one token")):
        generate(load_model(tiny), load_tokenizer(tiny), [""], WrittenAnswer(6))


@pytest.mark.parametrize(
    ("device", "present", "allowed"),
    [
        ("cuda", 0, "auto or cpu (no CUDA device)"),
        ("cuda:1", 0, "auto or cpu (no CUDA device)"),
        ("gpu", 0, "auto or cpu (no CUDA device)"),
        ("cuda:2", 2, "auto, cpu, or cuda:0 to cuda:1, or balanced"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, device: str, present: int, allowed: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    with pytest.raises(InputError, match=exactly(f"execution.device: got {device!r}; allowed here: {allowed}")):
        pick_device(device)
    assert pick_device("auto") == ("cuda" if present else "cpu")
    assert pick_device("cpu") == "cpu"
    if present:
        assert pick_device("cuda:1") == "cuda:1"


def test_a_model_is_measured_as_it_ships(tiny: Path, adapter: Path, folder: Callable[[str], Path]) -> None:
    """In bfloat16 merging rounds, so the merged checkpoint and the attached adapter are not the same model."""
    dense, merged = folder("dense"), folder("merged")
    shutil.copytree(tiny, dense, dirs_exist_ok=True)
    load_model(tiny).to(torch.bfloat16).save_pretrained(dense)
    shutil.copytree(adapter, unbound := folder("adapter"), dirs_exist_ok=True)
    (unbound / "base.json").unlink()
    merge_adapter(dense, unbound, out=merged)
    loaded = load_model(dense, unbound)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(load_model(merged)))
    assert not torch.equal(logits(loaded), logits(PeftModel.from_pretrained(load_model(dense), unbound)))


def test_a_type_written_by_transformers_4_is_kept(tmp_path: Path) -> None:
    dense = save_tiny_llama(tmp_path / "dense")
    load_model(dense).to(torch.bfloat16).save_pretrained(dense)
    config = json.loads((dense / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (dense / "config.json").write_text(json.dumps(config))
    assert load_model(dense).dtype == torch.bfloat16


def test_a_tensor_the_config_does_not_know_is_refused(tmp_path: Path) -> None:
    dense = save_tiny_llama(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is not in the archit"):
        load_model(dense)


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_the_type_auto_is_what_the_machine_computes_in_and_the_key_says_which(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, native: bool, expected: Dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)

    def key(dtype: Any) -> Any:
        return as_json(DenseSettings.of(ModelConfig(source=str(tiny), dtype=dtype)))

    assert key("auto") == key(expected)
    assert key("float16") == key(expected) | {"dtype": "float16"}
