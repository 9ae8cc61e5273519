"""Accuracy on train examples that tuning does not read, to compare its settings without touching the scored split.

    python tests/performance/train_slice.py CHECKPOINT [ADAPTER] --benchmark arc_easy --config data/quickstart.toml

They are neither shots nor held out, and come after the first SKIP of a random order by the seed.
"""

import random
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tailored_llama.config import load_config
from tailored_llama.data import (
    PromptSettings,
    draw_train,
    encode_prompt,
    headline_metric,
    load_template,
    loglikelihoods,
    render,
    without,
)
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.evaluation.scoring import predict
from tailored_llama.models import context_length, load_model, load_tokenizer


def main(
    checkpoint: Path,
    adapter: Annotated[Path | None, typer.Argument()] = None,
    benchmark: str = "arc_easy",
    config: Path | None = None,
    skip: int = 1000,
    count: int = 300,
) -> None:
    run = load_config(config, [])
    own = next(b for b in run.benchmarks if b.name == benchmark)
    train = load_examples(own, "train", run.store.downloads)
    _, tuned, held = draw_train(PromptSettings.of(run, own, "train"), train)
    rest = without(train, tuned + held)
    random.Random(run.seed).shuffle(rest)
    examples = rest[skip : skip + count]
    model, tokenizer = load_model(checkpoint, adapter, run.execution.device), load_tokenizer(checkpoint)
    prompts = [render(own, load_template(run.prompts.template), example) for example in examples]
    encoded = [encode_prompt(tokenizer, prompt, context_length(model)) for prompt in prompts]
    columns = predict(prompts, loglikelihoods(model, encoded, 1024))
    chosen = columns["prediction_norm" if headline_metric(own) == "acc_norm" else "prediction"]
    right = np.array(chosen) == np.array(columns["answer"])
    print(f"{right.mean():.3f} ± {right.std(ddof=1) / len(right) ** 0.5:.3f} on {len(right)} train examples")


if __name__ == "__main__":
    typer.run(main)
