"""How far a GGUF file in f32 or f16 is from its checkpoint in llama.cpp, and how much of that is rounding to float16.

    PYTHONPATH=tests python tests/performance/rounding.py CHECKPOINT

The last row is the checkpoint in transformers with its matrices rounded to float16: no GGUF file, no llama.cpp. Each
row is compared with the checkpoint as it is, in transformers in float32: the perplexity of passages of BoolQ, how far
it is off, with the paired standard error over the tokens, and the largest difference of a logit.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from llama_cpp import llama_cpp
from tailored_llama.config import GgufType, PerplexityConfig, validate_config
from tailored_llama.data import find_text, load_texts
from tailored_llama.models import load_model, load_tokenizer
from tailored_llama.serving import write_gguf

WINDOW = 512
FILES: tuple[GgufType, ...] = ("f32", "f16")


def by_transformers(model: Any, windows: list[list[int]]) -> list[torch.Tensor]:
    """Logits of each window, float32 [tokens, vocabulary]."""
    with torch.inference_mode():
        return [model(torch.tensor([window])).logits[0].float() for window in windows]


def by_llama_cpp(checkpoint: Path, kind: GgufType, windows: list[list[int]]) -> list[torch.Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        write_gguf(checkpoint, gguf_type=kind, out=(file := Path(scratch) / "model.gguf"))
        with llama_cpp(file, WINDOW) as runtime:
            return [runtime.logits(window) for window in windows]


def losses(logits: list[torch.Tensor], windows: list[list[int]]) -> torch.Tensor:
    pairs = zip(logits, windows, strict=True)
    return torch.cat([
        torch.nn.functional.cross_entropy(rows[:-1], torch.tensor(window[1:]), reduction="none")
        for rows, window in pairs
    ])  # fmt: skip


def main(
    checkpoint: Path, count: Annotated[int, typer.Option("--windows", help=f"Of {WINDOW} tokens each.")] = 2
) -> None:
    text = "\n".join(load_texts(find_text(PerplexityConfig()), validate_config({}).store.downloads)[:40])
    ids = load_tokenizer(checkpoint)(text)["input_ids"]
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]
    model = load_model(checkpoint).float()
    whole = by_transformers(model, windows)
    variants = {f"llama.cpp, {kind}": by_llama_cpp(checkpoint, kind, windows) for kind in FILES}
    for weights in model.parameters():
        if weights.dim() > 1:
            weights.data.copy_(weights.data.half())
    variants["transformers, matrices rounded to float16"] = by_transformers(model, windows)
    reference = losses(whole, windows)
    print(f"transformers, float32: perplexity {reference.mean().exp():.3f} on {len(reference):,} tokens")
    for name, logits in variants.items():
        off = losses(logits, windows) - reference
        largest = max(float((one - other).abs().max()) for one, other in zip(logits, whole, strict=True))
        print(
            f"{name}: perplexity {(reference + off).mean().exp():.3f}, off by {100 * off.mean().expm1():.4f} ± "
            f"{100 * off.std() / len(off) ** 0.5:.4f} %; largest difference of a logit {largest:.1e}"
        )


if __name__ == "__main__":
    typer.run(main)
