"""Is pruning worth it beside quantisation? Checkpoints in several GGUF types: bytes, accuracy and speed in llama.cpp.

    python tests/performance/bits.py dense=FOLDER pruned=FOLDER [--type f16 --type q8_0 --type q4_k_m] \
        [--benchmark arc_easy] [--limit 200] [--out table.md]

Accuracy is acc_norm on evenly spaced documents, from log-likelihoods that llama.cpp computes. It is printed with its
standard error, and chance-corrected: (accuracy − floor) ÷ (accuracy of the first file − floor). Speeds are medians of
`--repetitions`, in turns over all files: tokens per second of a prompt of 256 tokens, and of 32 tokens generated after
it one by one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from llama_cpp import LlamaCpp, llama_cpp
from tailored_llama.config import as_gguf_type, validate_config
from tailored_llama.data import Prompt, load_template, render
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.data.selection import select_evaluation
from tailored_llama.evaluation.scoring import choice_floor
from tailored_llama.models import encode_pair, load_tokenizer
from tailored_llama.serving import write_gguf

CONTEXT = 1024


def main(
    checkpoints: list[str],
    types: Annotated[list[str], typer.Option("--type")] = ["f16", "q8_0", "q4_k_m"],  # noqa: B006  typer's form
    benchmark: str = "arc_easy",
    limit: int = 200,
    repetitions: int = 5,
    out: Path | None = None,
) -> None:
    run = validate_config({"benchmarks": [benchmark]})
    examples = load_examples(run.benchmarks[0], "evaluation", run.store.downloads)
    template = load_template("harness")
    prompts = [render(run.benchmarks[0], template, example) for example in select_evaluation(examples, limit)]
    floor = choice_floor(prompts)
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for given in checkpoints:
            label, _, folder = given.partition("=")
            for name in types:
                path = Path(scratch) / f"{label}-{name}.gguf"
                write_gguf(Path(folder), gguf_type=as_gguf_type(name), out=path)
                files[label, name] = (Path(folder), path)
        right = {key: hits(folder, path, prompts) for key, (folder, path) in files.items()}
        speeds: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in files}
        for _ in range(repetitions):
            for key, (_, path) in files.items():
                with llama_cpp(path, CONTEXT) as runtime:
                    speeds[key].append(speed(runtime))
        whole = float(np.mean(next(iter(right.values())))) - floor
        lines = [
            f"| model | type | MB | {benchmark} | chance-corrected | prompt tokens/s | generated tokens/s |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
        for (label, name), (_, path) in files.items():
            found = right[label, name]
            mean, error = float(np.mean(found)), float(np.std(found, ddof=1) / len(found) ** 0.5)
            prompt, generated = (statistics.median(values) for values in zip(*speeds[label, name], strict=True))
            lines.append(
                f"| {label} | {name} | {path.stat().st_size / 1e6:.0f} | {mean:.3f} ± {error:.3f} "
                f"| {(mean - floor) / whole:.0%} | {prompt:.0f} | {generated:.0f} |"
            )
    lines.append(f"\nFloor {floor:.3f}, {limit} documents.")
    print("\n".join(lines))
    if out:
        out.write_text("\n".join(lines) + "\n")


def hits(checkpoint: Path, file: Path, prompts: list[Prompt]) -> list[float]:
    """Whether the choice with the highest log-likelihood per character is the right one, for every prompt."""
    tokenizer = load_tokenizer(checkpoint)
    found = []
    with llama_cpp(file, CONTEXT) as runtime:
        for prompt in prompts:
            scores = [
                loglikelihood(runtime, *encode_pair(tokenizer, context, continuation)) / length
                for context, continuation, length in zip(
                    prompt.contexts, prompt.continuations, prompt.choice_lengths, strict=True
                )
            ]
            found.append(float(int(np.argmax(scores)) == prompt.answer))
    return found


def loglikelihood(runtime: LlamaCpp, context: list[int], continuation: list[int]) -> float:
    rows = runtime.logits([*context, *continuation][-CONTEXT:])[-len(continuation) - 1 : -1]
    return float(rows.log_softmax(-1)[range(len(continuation)), torch.tensor(continuation)].sum())


def speed(runtime: LlamaCpp) -> tuple[float, float]:
    """Tokens per second of a prompt, and of tokens generated after it."""
    ids = np.random.default_rng(0).integers(5, 1000, 256).tolist()
    runtime.logits(ids[:1])  # clears the cache
    start = time.perf_counter()
    runtime.extend(ids, 1, [False] * 255 + [True])
    middle = time.perf_counter()
    for position in range(257, 289):
        runtime.extend([7], position)
    return 256 / (middle - start), 32 / (time.perf_counter() - middle)


if __name__ == "__main__":
    typer.run(main)
