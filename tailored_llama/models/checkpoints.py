"""Checkpoint files: validation and the widths of layers. No model is built here."""

import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tailored_llama.errors import InputError, one_line
from tailored_llama.models.families import ALLOWED, EMBEDDING, Family, check_architecture, family_of
from tailored_llama.store import sha256_file

WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # of a configuration, as in Layer
# Tensors with a row for each token
VOCABULARY = (EMBEDDING, "lm_head.weight", "lm_head.bias", "model.embed_tokens_per_layer.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")
HEADS = WIDTHS[0]
ATTENDING = ("full", "sliding", "chunked", "attention")  # types of layers that keep keys and values
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # of Phi-3


@dataclass(frozen=True)
class Layer:
    """Widths of a decoder layer."""

    heads: int
    kv_heads: int
    channels: int

    @property
    def share(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Size:
    """A checkpoint's size: all parameters, the body (without embedding and untied head), and the embedding's rows."""

    parameters: int
    body: int
    vocab_size: int

    @property
    def row(self) -> int:
        """Parameters of one token."""
        return (self.parameters - self.body) // self.vocab_size


@dataclass(frozen=True)
class Structure:
    """The facts about a checkpoint that pruning needs, read from its files without loading weights."""

    model_type: str
    hidden_size: int
    head_dim: int
    depth: int  # layers
    layer: Layer  # all layers are alike; of a model of which only tokens leave, as its configuration states them
    attending: int  # layers that keep keys and values
    size: Size

    @property
    def parameters(self) -> int:
        """All stored parameters."""
        return self.size.parameters


def cache_bytes(structure: Structure) -> int:
    """The bytes of the keys and values of 4,096 tokens, in 16 bits; a sliding window is not counted on."""
    return 2 * 2 * 4096 * structure.head_dim * structure.layer.kv_heads * structure.attending


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, else those its index names, as in transformers."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single]
    if index.is_file() and not single.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            files = []
        if not files or any(file.parent != folder for file in files):
            raise InputError(f"{index}: not a safetensors index")
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder}: {file.name} is missing; allowed: a checkpoint in safetensors")
    return files


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Name → shape of every tensor of a safetensors file of floats, by its header; InputError if it is none, or cut."""
    shapes: dict[str, list[int]] = {}
    try:
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_slice(name)
                shapes[name], dtype = tensor.get_shape(), tensor.get_dtype()
                if dtype not in _FLOATS:
                    raise InputError(f"{path}: tensor {name[:200]} is of type {dtype}; allowed: {', '.join(_FLOATS)}")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({one_line(error)})") from None
    return shapes


def weight_bytes(folder: Path) -> int:
    """Size of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in weight_files(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint as plain data; that of the text part, if a model also reads images or sound."""
    file = folder / "config.json"
    try:
        config = {**json.loads(file.read_text())}
        if not config.get("text_config"):
            return config
        from transformers import AutoConfig  # late: it takes seconds, and knows what is not stated

        return {**config, **AutoConfig.from_pretrained(folder).get_text_config().to_dict()}
    except (OSError, ValueError, TypeError):
        raise InputError(f"{file}: missing or not JSON; allowed: a checkpoint folder") from None


def read_structure(folder: Path, part: bool = False) -> Structure:
    """A checkpoint's widths and true parameter count, by its headers; tied tensors are stored, and counted, once.

    With `part`, that of the text part of a model that also reads images or sound. Raises InputError if the checkpoint
    is not complete, or its architecture is not supported.
    """
    config = read_config(folder)
    check_architecture(config, str(folder))
    if config.get("text_config") and not part:
        allowed = "its text part, as `tailored-llama convert` writes it"
        raise InputError(f"{folder}: got a model that also reads images or sound; allowed: {allowed}")
    shapes, kind = all_tensor_shapes(folder), config["model_type"]
    family = family_of(kind)
    if EMBEDDING not in shapes and (config.get("text_config") or family.level == "tokens"):
        raise InputError(f"model.source {folder}: architecture {kind}, without {EMBEDDING}; {ALLOWED}")
    _check_sizes(config, shapes, folder, () if family.level == "tokens" else WIDTHS)
    try:
        head_dim, depth = head_dim_of(config), config["num_hidden_layers"]
        stated = Layer(*(value if type(value := config.get(name)) is int else 1 for name in WIDTHS))
        widths = {_layer(shapes, f"model.layers.{i}.", head_dim, stated, family) for i in range(depth)}
        layer, *different = widths
    except KeyError as error:
        told = f"tensor {error.args[0]} is missing; allowed: a checkpoint with all of its weights"
        raise InputError(f"{folder}: {told}") from None
    except (IndexError, ZeroDivisionError):
        raise InputError(f"{folder}: its widths do not fit its weights; allowed: a whole checkpoint") from None
    if different:
        raise InputError(f"{folder}: its layers have different widths; allowed: layers that are all alike")
    total = sum(math.prod(shape) for shape in shapes.values())
    tables = [shapes[name] for name in VOCABULARY if name in shapes]
    if len({rows for rows, *_ in tables}) > 1:
        raise InputError(f"{folder}: got tables of tokens with different numbers of rows; allowed: one row a token")
    attending = sum(str(kind).removesuffix("_attention") in ATTENDING for kind in config.get("layer_types") or ())
    size = Size(total, total - sum(map(math.prod, tables)), tables[0][0] if tables else 0)
    return Structure(kind, config["hidden_size"], head_dim, depth, layer, attending or depth, size)


def all_tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Name → shape of every tensor of a checkpoint, or of its text part; InputError if a file is missing or cut."""
    shapes = {name: shape for file in weight_files(folder) for name, shape in tensor_shapes(file).items()}
    return {name: shapes[stored] for name, stored in text_tensors(shapes).items()}


def unfused(name: str, structure: Structure) -> dict[str, slice]:
    """The projections that a tensor holds, by the names of separate ones, and the rows of each; one alone has all."""
    match = re.fullmatch(r"model\.layers\.\d+\.\w+\.(\w+)\.\w+", name)
    if not match or (fused := match[1]) not in FUSED:
        return {name: slice(None)}
    layer, head_dim = structure.layer, structure.head_dim
    key_rows = layer.kv_heads * head_dim
    sizes = [layer.heads * head_dim, key_rows, key_rows] if fused == "qkv_proj" else [layer.channels] * 2
    ends = itertools.accumulate(sizes)
    return {
        name.replace(fused, part): slice(end - size, end)
        for part, size, end in zip(FUSED[fused], sizes, ends, strict=True)
    }


def text_tensors(stored: Collection[str]) -> dict[str, str]:
    """Tensors by their names in a model for text, from those in the files of one that may read images or sound, too."""
    if not any("language_model." in name for name in stored):
        return {name: name for name in stored}
    names = {name: re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name) for name in stored}
    names = {name: text.removeprefix("model.") if "lm_head." in text else text for name, text in names.items()}
    return {text: name for name, text in names.items() if text != name or "lm_head." in name}


def _check_sizes(config: dict[str, Any], shapes: dict[str, list[int]], folder: Path, widths: Sequence[str]) -> None:
    """Reject sizes larger than those of the weights: transformers would allocate a model of the stated sizes."""
    required = ("hidden_size", "num_hidden_layers", HEADS if HEADS in config else "head_dim")
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    layers = {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
    limits = dict.fromkeys(("vocab_size", "hidden_size", "head_dim", *widths), largest)
    for name, limit in (limits | {"num_hidden_layers": len(layers)}).items():
        value = config.get(name)
        if value is None and name not in required:
            continue
        if type(value) is not int or not 1 <= value <= limit:
            allowed = f"a whole number from 1 to {limit}, since its weights are no larger"
            raise InputError(f"{folder / 'config.json'}: {name}: got {value!r:.80}; allowed: {allowed}")


def _layer(shapes: dict[str, list[int]], prefix: str, head_dim: int, stated: Layer, family: Family) -> Layer:
    """Widths of a layer by its weights, or as they are stated where these are not known."""
    if family.level == "tokens":
        return stated
    if not family.packed:
        return replace(stated, channels=shapes[f"{prefix}mlp.down_proj.weight"][1])
    heads = shapes[f"{prefix}self_attn.o_proj.weight"][1] // head_dim
    if fused := shapes.get(f"{prefix}self_attn.qkv_proj.weight"):
        kv_heads = (fused[0] // head_dim - heads) // 2
    else:
        kv_heads = shapes[f"{prefix}self_attn.k_proj.weight"][0] // head_dim
    return Layer(heads, kv_heads, shapes[f"{prefix}mlp.down_proj.weight"][1])


def head_dim_of(config: dict[str, Any]) -> int:
    """Width of a head, stated or the hidden size's share."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def query_scale(config: dict[str, Any]) -> int:
    """The width by whose root llama.cpp divides the queries of a Gemma 2 or 3, which a GGUF file does not state.

    It is that of a head, and in the models of 27B parameters the hidden size's share (gemma2.cpp and gemma3.cpp).
    """
    is_27b = config["num_hidden_layers"] == {"gemma2": 46, "gemma3_text": 62}[config["model_type"]]
    return int(config["hidden_size"] // config["num_attention_heads"]) if is_27b else head_dim_of(config)


def weights_digest(folder: Path) -> str:
    """SHA-256 over a checkpoint's weights, which identifies an adapter's base."""
    return hashlib.sha256("".join(map(sha256_file, weight_files(folder))).encode()).hexdigest()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer and generation files from one checkpoint folder to another."""
    for path in source.iterdir():
        if path.suffix != ".parquet" and path.name.startswith(
            ("tokenizer", "special_tokens", "added_tokens", "chat_template", "generation_config", "vocab", "merges")
        ):
            shutil.copyfile(path, target / path.name)
