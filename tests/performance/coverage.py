"""How many tokens of a job stay whole, if a vocabulary is chosen by a few of its rows and by general text?

    python tests/performance/coverage.py DENSE --tokens 28672 --tokens 36864
    python tests/performance/coverage.py DENSE --write tailored_llama/data/general_words.parquet

For each embedded benchmark, tokens are chosen by some of its train rows, and by the words of the other seven. Then the
tokens of its evaluation split are counted. The first column weighs general text with no tokens at all. The logarithm is
the mean of log(share) of an evaluation token: the weight that foretells tokens best has the highest.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from tailored_llama.config import BenchmarkConfig, StoreConfig
from tailored_llama.data import BUILTIN, load_questions
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.models import load_tokenizer, read_tokens
from tailored_llama.pruning.vocabulary import choose_tokens, word_counts

DOWNLOADS = StoreConfig.model_fields["downloads"].default
WEIGHTS = (0, 3_000, 10_000, 30_000, 100_000)
LEAST = 3  # times that a word occurs, to be listed


def words_of(texts: Iterable[str]) -> Counter[str]:
    """Words with the space before them, if any."""
    return Counter(word for text in texts for word in re.findall(r" ?\S+", text))


def main(
    dense: Path,
    tokens: Annotated[list[int] | None, typer.Option(help="Numbers of tokens; repeatable.")] = None,
    rows: Annotated[int, typer.Option(help="Train rows of the benchmark.")] = 100,
    write: Annotated[Path | None, typer.Option(help="Write the list of general words here instead.")] = None,
) -> None:
    """Measure, or write the words; see the top of this file."""
    trained = {name: load_questions(BenchmarkConfig(name=name), DOWNLOADS, choices=True).values() for name in BUILTIN}
    words = {name: words_of(texts) for name, texts in trained.items()}
    if write:
        found = sum(words.values(), Counter[str]())
        listed = sorted(((word, n) for word, n in found.items() if n >= LEAST), key=lambda own: (-own[1], own[0]))
        table = pd.DataFrame(listed, columns=["word", "count"]).astype({"count": "int32"})
        table.to_parquet(write, index=False, compression="zstd", compression_level=19)
        print(f"{write}: {len(listed):,} words")
        return
    tokenizer, known = load_tokenizer(dense), read_tokens(dense)
    counted = {name: word_counts(tokenizer, own, known.rows) for name, own in words.items()}
    table = []
    for name, texts in trained.items():
        examples = load_examples(BenchmarkConfig(name=name), "evaluation", DOWNLOADS)
        evaluation = words_of(" ".join((*own.fields.values(), *own.choices)) for own in examples)
        scored = word_counts(tokenizer, evaluation, known.rows)
        own = word_counts(tokenizer, words_of(random.Random(0).sample(list(texts), rows)), known.rows)
        general = sum(counts for other, counts in counted.items() if other != name)
        for weight in WEIGHTS:
            shares = (own + weight * general / general.sum()) / (own.sum() + weight)
            row = {"benchmark": name, "weight": weight, "log": float(scored @ np.log(shares + 1e-7) / scored.sum())}
            for size in tokens or ():
                kept = list(choose_tokens(known, shares, size).kept)
                row[f"whole, {size:,}"] = float(scored[kept].sum() / scored.sum())
            table.append(row)
    print(pd.DataFrame(table).set_index(["benchmark", "weight"]).round(4).to_string())


if __name__ == "__main__":
    typer.run(main)
