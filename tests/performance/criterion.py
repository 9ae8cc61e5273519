"""What foretells the accuracy of a pruned model after tailoring? Plans of one ratio, compared on train examples alone.

    python tests/performance/criterion.py FOLDER data/quickstart.toml
    python tests/performance/criterion.py FOLDER data/quickstart.toml --text passages --text questions \\
        --vary reconstruction.method=static --vary reconstruction.method=none

The plans differ in their calibration text, and in one setting. Each is measured untuned, then tailored to every one of
the benchmarks.
Examples are from the train splits, and are neither shots nor held out. Accuracies and choice losses are of one half of
them, and tailored accuracies of the other, so that the two share no luck. The gains over the first plan are of all
examples, with paired standard errors. The last table has rank correlations over the plans: of each untuned figure with
the mean tailored accuracy, and with the tailored gain. Everything is kept in FOLDER, and found again.
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import typer

from common import divided, kept_in, measure_divergence, render_slices, with_pruning
from tailored_llama.config import RunConfig, load_config, trims_vocabulary
from tailored_llama.data import headline_metric
from tailored_llama.errors import InputError
from tailored_llama.evaluation import read_metrics, read_score
from tailored_llama.pipeline import Artifact, Executor, steps

TEXTS = {"passages": '"boolq"', "prompts": '"prompts"', "questions": '"questions"'}
VARIED = ("pruning", "calibration", "reconstruction")


def accuracy_and_loss(predictions: pd.DataFrame, metric: str) -> dict[str, float]:
    """Accuracy, and the mean of −log p(right choice) among the choices."""
    chosen = predictions["prediction_norm" if metric == "acc_norm" else "prediction"]
    logits = predictions["loglikelihoods"].map(lambda values: values - np.logaddexp.reduce(values))
    right = [row[answer] for row, answer in zip(logits, predictions["answer"], strict=True)]
    return {"accuracy": float((chosen == predictions["answer"]).mean()), "choice loss": -float(np.mean(right))}


def measure(
    run: Executor, config: RunConfig, name: str, prompts: steps.Prompts, slices: Mapping[str, Artifact], trimmed: bool
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The figures of one plan: untuned, and of each benchmark once tailored to it; and all answers, right or not.

    Where a plan is trimmed, tokens and distributions are no longer those of the dense model: then there is no
    divergence, and perplexity is per byte.
    """
    (ratio,) = config.pruning.ratios
    dense = steps.prepare_dense(config, prompts)
    pruned = steps.prune_to(config, dense, ratio, prompts)
    row = {} if trimmed else measure_divergence(run, config, dense.checkpoint, pruned, slices)
    figure = "byte_perplexity" if trimmed else "perplexity"
    perplexity = steps.measure_perplexity(config, name, pruned, dense.checkpoint)
    row[figure] = read_metrics(run.open(perplexity))[figure]
    answers: dict[str, list[np.ndarray]] = {"untuned": [], "tailored": []}
    for own in config.benchmarks:
        adapter = steps.tune(config, [own.name], ratio, pruned, prompts)
        found = {}
        for model, attached, half in (("untuned", None, 0), ("tailored", adapter, 1)):
            label = f"{name}, {model}"
            scores = steps.score(config, own.name, label, pruned, slices[own.name], attached, "selection")
            table = pq.read_table(run.open(scores) / "predictions.parquet").to_pandas().iloc[half::2]
            found[model] = accuracy_and_loss(table, headline_metric(own))
            answers[model].append(read_score(run.open(scores)).answers.values)
        row |= {f"{figure}, {own.name}": value for figure, value in found["untuned"].items()}
        row[f"tailored, {own.name}"] = found["tailored"]["accuracy"]
    for name in ("accuracy", "choice loss", "tailored"):
        row[f"{name}, mean"] = float(np.mean([row[f"{name}, {own.name}"] for own in config.benchmarks]))
    return row, {model: np.concatenate(parts) for model, parts in answers.items()}


def against(answers: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Difference in accuracy from the first plan over all benchmarks and examples, and its paired standard error."""
    found = {}
    for model, values in answers.items():
        gains = values - first[model]
        found[f"gain, {model}"] = float(gains.mean())
        found[f"its error, {model}"] = float(gains.std(ddof=1) / len(gains) ** 0.5)
    return found


def main(
    folder: Path,
    config: Path,
    ratio: float = 0.2,
    text: Annotated[list[str] | None, typer.Option(help=f"Repeatable; of {', '.join(TEXTS)}; all by default.")] = None,
    examples: Annotated[int, typer.Option(help="Train examples of each benchmark, half for each model.")] = 240,
    vary: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE to try every text with, spaces between several; repeatable.")
    ] = None,
    override: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Measure every plan; see the top of this file."""
    for setting in " ".join(vary or []).split():  # prompts are rendered once, for all plans
        if setting.split(".")[0] not in VARIED:
            raise InputError(f"--vary: got {setting!r}; allowed: fields of {', '.join(VARIED)}")
    if unknown := set(text or []) - TEXTS.keys():
        raise InputError(f"--text: got {', '.join(unknown)}; allowed: {', '.join(TEXTS)}")
    plans = {}
    for setting, name in product(vary or [""], text or TEXTS):
        changed = [f"calibration.source={TEXTS[name]}", *setting.split()]
        own = divided(load_config(str(config), [*(override or []), *changed]))
        plans[f"{name} {setting}".strip()] = with_pruning(own, ratios=(ratio,))
    base = divided(load_config(str(config), override or []))
    run, rows = kept_in(folder, base), {}
    prompts, slices = steps.render_all(base), render_slices(run, base, examples)
    trimmed = any(map(trims_vocabulary, plans.values()))
    first: dict[str, np.ndarray] = {}
    for name, plan in plans.items():
        row, answers = measure(run, plan, name, prompts, slices, trimmed)
        first = first or answers
        rows[name] = row | against(answers, first)
        table = pd.DataFrame.from_dict(rows, orient="index")
        table.to_parquet(folder / "plans.parquet")
        print(table.iloc[-1].round(3).to_dict(), flush=True)
    print(table.round(3).to_string())
    figures = [name for name in table if "error" not in name and not name.startswith("tailored")]
    print(table.corr("spearman").loc[figures, ["tailored, mean", "gain, tailored"]].round(2).to_string())


if __name__ == "__main__":
    typer.run(main)
