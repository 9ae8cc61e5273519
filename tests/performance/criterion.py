"""What foretells the accuracy of a pruned model after tailoring? Plans of one ratio, compared on train examples alone.

    python tests/performance/criterion.py FOLDER data/quickstart.toml
    python tests/performance/criterion.py FOLDER data/quickstart.toml --text passages --text questions \\
        --vary pruning.allocation=global --vary pruning.allocation=uniform

The plans differ in their calibration text, and in one setting. Each is measured untuned, then tailored to every one of
the benchmarks.
Examples are from the train splits, and are neither shots nor held out. Accuracies and choice losses are of one half of
them, and tailored accuracies of the other, so that the two share no luck. The gains over the first plan are of all
examples, with paired standard errors. The last table has rank correlations over the plans: of each untuned figure with
the mean tailored accuracy, and with the tailored gain. Everything is kept in FOLDER, and found again.

torch's threads should not spin: set OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import typer

from allocation import diverge, once
from tailored_llama.cli.stages import prune_in_steps, render
from tailored_llama.config import BenchmarkConfig, DistillationConfig, RunConfig, load_config, trims_vocabulary
from tailored_llama.data import headline_metric
from tailored_llama.errors import InputError
from tailored_llama.evaluation.perplexity import measure_perplexity
from tailored_llama.evaluation.scores import read_score
from tailored_llama.evaluation.scoring import score_benchmark
from tailored_llama.models import convert
from tailored_llama.training.tuning import Source, tune

EVERYDAY = '{source = "hellaswag", column = "query"}'  # what people do, in videos and instructions
QUESTIONS = (EVERYDAY, '{source = "arc_easy", column = "question"}', '{source = "piqa", column = "question"}')
TEXTS = {
    "passages": '"boolq"',
    "everyday": f"[{EVERYDAY}]",
    "prompts": '"prompts"',
    "passages + prompts": '["boolq", "prompts"]',
    "questions": f"[{', '.join(QUESTIONS)}]",
}


def render_into(run: RunConfig, benchmark: BenchmarkConfig, examples: int, out: Path) -> None:
    for split in ("train", "selection"):
        (out / split).mkdir()
        render(run, benchmark, split, out / split, examples)


def accuracy_and_loss(predictions: pd.DataFrame, metric: str) -> dict[str, float]:
    """Accuracy, and the mean of −log p(right choice) among the choices."""
    chosen = predictions["prediction_norm" if metric == "acc_norm" else "prediction"]
    logits = predictions["loglikelihoods"].map(lambda values: values - np.logaddexp.reduce(values))
    right = [row[answer] for row, answer in zip(logits, predictions["answer"], strict=True)]
    return {"accuracy": float((chosen == predictions["answer"]).mean()), "choice loss": -float(np.mean(right))}


def measure(
    run: RunConfig, dense: Path, rendered: dict[str, Path], ratio: float, folder: Path, trimmed: bool
) -> dict[str, float]:
    """The figures of one plan: untuned, and of each benchmark once tailored to it.

    Where a plan is trimmed, tokens and distributions are no longer those of the dense model: then there is no
    divergence, and perplexity is per byte.
    """
    folder.mkdir(exist_ok=True)

    def cut(out: Path) -> Any:
        with tempfile.TemporaryDirectory() as work:
            names = [own.name for own in run.benchmarks] if trims_vocabulary(run) else []
            return prune_in_steps(
                run, dense, ratio, lambda name: Path(tempfile.mkdtemp(dir=work, prefix=name)), out, names
            )

    def read(out: Path) -> None:
        text, downloads = run.perplexity, run.store.downloads
        measure_perplexity(checkpoint, text=text, downloads=downloads, out=out, execution=run.execution)

    def score(own: BenchmarkConfig, adapter: Path | None, out: Path) -> None:
        prompts = rendered[own.name] / "selection" / "prompts"
        options: dict[str, Any] = {"benchmark": own, "split": "selection", "execution": run.execution}
        score_benchmark(checkpoint, adapter, prompts, out=out, **options)

    def train(own: BenchmarkConfig, out: Path) -> Any:
        source = Source(rendered[own.name] / "train" / "prompts", headline_metric(own))
        options: dict[str, Any] = {"tuning": run.tuning, "seed": run.seed, "execution": run.execution}
        return tune(checkpoint, [source], distillation=DistillationConfig(), out=out, **options)

    checkpoint = once(folder / "pruned", cut)
    slices = [rendered[own.name] / "selection" / "prompts" for own in run.benchmarks]
    row: dict[str, float] = {}
    if not trimmed:
        diverged = once(folder / "divergence", partial(diverge, run, dense, checkpoint, slices))
        row = {f"divergence, {k}": v for k, v in json.loads((diverged / "metrics.json").read_text()).items()}
    figure = "byte_perplexity" if trimmed else "perplexity"
    row[figure] = json.loads((once(folder / "perplexity", read) / "metrics.json").read_text())[figure]
    for own in run.benchmarks:
        adapter = once(folder / f"adapter {own.name}", partial(train, own))
        found = {}
        for model, attached, half in (("untuned", None, 0), ("tailored", adapter, 1)):
            out = once(folder / f"{model} {own.name}", partial(score, own, attached))
            table = pq.read_table(out / "predictions.parquet").to_pandas().iloc[half::2]
            found[model] = accuracy_and_loss(table, headline_metric(own))
        row |= {f"{name}, {own.name}": value for name, value in found["untuned"].items()}
        row[f"tailored, {own.name}"] = found["tailored"]["accuracy"]
    for name in ("accuracy", "choice loss", "tailored"):
        row[f"{name}, mean"] = float(np.mean([row[f"{name}, {own.name}"] for own in run.benchmarks]))
    return row


def against(run: RunConfig, folder: Path, first: Path) -> dict[str, float]:
    """Difference in accuracy from the first plan over all benchmarks and examples, and its paired standard error."""
    found = {}
    for model in ("untuned", "tailored"):
        answers = [
            np.concatenate([read_score(plan / f"{model} {own.name}").answers.values for own in run.benchmarks])
            for plan in (folder, first)
        ]
        gains = answers[0] - answers[1]
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
        list[str] | None,
        typer.Option(help="KEY=VALUE of pruning, calibration or reconstruction to try every text with; repeatable."),
    ] = None,
    override: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Measure every plan; see the top of this file."""
    for setting in vary or []:  # prompts are rendered once, for all plans
        if setting.split(".")[0] not in ("pruning", "calibration", "reconstruction"):
            raise InputError(f"--vary: got {setting!r}; allowed: fields of pruning, calibration and reconstruction")
    if unknown := set(text or []) - TEXTS.keys():
        raise InputError(f"--text: got {', '.join(unknown)}; allowed: {', '.join(TEXTS)}")
    plans = {}
    for setting, name in product(vary or [""], text or TEXTS):
        changed = [f"calibration.source={TEXTS[name]}", *([setting] if setting else [])]
        plans[f"{name} {setting}".strip().replace("/", "_")] = load_config(str(config), [*(override or []), *changed])
    folder.mkdir(parents=True, exist_ok=True)
    run, rows = load_config(str(config), override or []), {}
    dense = once(folder / "dense", lambda out: convert.prepare_dense(run.model, downloads=run.store.downloads, out=out))
    rendered = {
        own.name: once(folder / f"prompts {own.name}", partial(render_into, run, own, examples))
        for own in run.benchmarks
    }
    trimmed = any(map(trims_vocabulary, plans.values()))
    folders = [folder / name for name in plans]
    for own, plan in zip(folders, plans.values(), strict=True):
        row = measure(plan, dense, rendered, ratio, own, trimmed)
        rows[own.name] = row | against(run, own, folders[0])
        table = pd.DataFrame.from_dict(rows, orient="index")
        table.to_parquet(folder / "plans.parquet")
        print(table.iloc[-1].round(3).to_dict(), flush=True)
    print(table.round(3).to_string())
    figures = [name for name in table if "error" not in name and not name.startswith("tailored")]
    print(table.corr("spearman").loc[figures, ["tailored, mean", "gain, tailored"]].round(2).to_string())


if __name__ == "__main__":
    typer.run(main)
