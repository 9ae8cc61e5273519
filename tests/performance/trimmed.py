"""What a trimmed GGUF file gains in llama.cpp, and whether it still writes the same.

    PYTHONPATH=tests python tests/performance/trimmed.py BEFORE.gguf AFTER.gguf --text my.csv

Both continue texts of the file by their likeliest tokens, on one thread and in turns, and CPU seconds are counted, so
that a busy machine changes little. Printed are the tokens a second of writing, the ratio of both (median, and the
middle four fifths of the texts), how many continuations are the same text, and how many more tokens all texts take to
read. The file should not be the one that the vocabulary was trimmed by.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import typer

from llama_cpp import LlamaCpp, llama_cpp
from tailored_llama.data import all_texts

CONTEXT = 512


def write(runtime: LlamaCpp, text: str, count: int) -> tuple[str, float]:
    """A continuation, and how many tokens a second are written after the first."""
    logits = runtime.logits(ids := runtime.tokens(text)[: CONTEXT - count])
    new = [int(logits[-1].argmax())]
    start = time.process_time()
    for at in range(len(ids), len(ids) + count - 1):
        new.append(int(runtime.extend(new[-1:], at).argmax()))
    speed = (count - 1) / (time.process_time() - start)
    return runtime.model.detokenize(new), speed


def main(
    before: Path,
    after: Path,
    text: Annotated[Path, typer.Option(help="Texts to continue: .txt, .csv, .jsonl or .parquet.")],
    repetitions: Annotated[int, typer.Option(min=2, help="Texts, evenly spaced.")] = 20,
    tokens: Annotated[int, typer.Option(min=2, max=CONTEXT // 2, help="Tokens written after each.")] = 32,
) -> None:
    """Compare a GGUF file with its trimmed form; see the top of this file."""
    every = all_texts(text)
    texts = [own for own in every if len(own) > 40]
    texts = texts[:: max(1, len(texts) // repetitions)][:repetitions]
    with llama_cpp(before, CONTEXT) as whole, llama_cpp(after, CONTEXT) as small:
        for runtime in (whole, small):
            runtime.lib.llama_set_n_threads(runtime.model._ctx, 1, 1)
            write(runtime, texts[0], tokens)  # not timed: reads the file
        pairs = [(write(whole, own, tokens), write(small, own, tokens)) for own in texts]
        read = [sum(len(runtime.tokens(own)) for own in every) for runtime in (whole, small)]
    speeds = [statistics.median(pair[side][1] for pair in pairs) for side in (0, 1)]
    ratios = sorted(new / old for (_, old), (_, new) in pairs)
    same = sum(old == new for (old, _), (new, _) in pairs)
    print(f"{before.stat().st_size / 1e6:.0f} MB -> {after.stat().st_size / 1e6:.0f} MB")
    print(f"tokens a CPU second: {speeds[0]:.1f} -> {speeds[1]:.1f}, ratio {statistics.median(ratios):.2f}", end=" ")
    print(f"({ratios[len(ratios) // 10]:.2f} to {ratios[-1 - len(ratios) // 10]:.2f}, the middle four fifths)")
    print(f"the same text: {same} of {len(pairs)}; tokens to read: {read[0]:,}, {read[1] / read[0] - 1:+.2%}")


if __name__ == "__main__":
    typer.run(main)
