"""Does a lever gain anything after tailoring? Each is measured beside the same run without it, on train examples.

    python tests/performance/levers.py FOLDER CONFIG.toml --ratio 0.6 --seed 0 --seed 1 \\
        --lever search='pruning.allocation=search' --lever ranking='tuning.ranking=1'

CONFIG is the run without levers. A lever is a name and fields that it sets, spaces between them. Every variant is
pruned, tuned to each benchmark of the configuration, and scored on further examples of the train splits, which are
neither shots nor held out nor unlabelled prompts. Differences are paired over examples and seeds. Everything is kept in
FOLDER, and found again. torch's threads should not spin: set OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from allocation import once
from criterion import render_into
from tailored_llama.cli.stages import prune_in_steps, soft_label
from tailored_llama.config import BenchmarkConfig, RunConfig, load_config
from tailored_llama.data import headline_metric, read_prompts
from tailored_llama.evaluation.scores import read_score
from tailored_llama.evaluation.scoring import score_benchmark
from tailored_llama.models import convert
from tailored_llama.training.tuning import Source, tune

RIVALS = ("pruning", "calibration", "reconstruction")  # sections that change the pruned model


def cut(run: RunConfig, dense: Path, ratio: float, out: Path) -> Any:
    with tempfile.TemporaryDirectory() as work:
        names = [own.name for own in run.benchmarks]
        return prune_in_steps(run, dense, ratio, lambda name: Path(tempfile.mkdtemp(dir=work, prefix=name)), out, names)


def label(run: RunConfig, own: BenchmarkConfig, dense: Path, out: Path) -> None:
    soft_label(run, own, dense, lambda name: (out / name).mkdir() or out / name)


def train(run: RunConfig, own: BenchmarkConfig, checkpoint: Path, prompts: Path, soft: Path | None, out: Path) -> Any:
    source = Source(prompts, headline_metric(own), None, soft)
    options: dict[str, Any] = {"tuning": run.tuning, "seed": run.seed, "execution": run.execution}
    return tune(checkpoint, [source], distillation=run.distillation, out=out, **options)


def score(
    run: RunConfig, own: BenchmarkConfig, checkpoint: Path, adapter: Path | None, prompts: Path, out: Path
) -> None:
    options: dict[str, Any] = {"benchmark": own, "split": "selection", "execution": run.execution}
    score_benchmark(checkpoint, adapter, prompts, out=out, **options)


def main(
    folder: Path,
    config: Path,
    lever: Annotated[list[str], typer.Option(help="NAME=FIELD=VALUE …; repeatable.")],
    ratio: float = 0.6,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Repeatable; 0 and 1 by default.")] = None,
    examples: Annotated[int, typer.Option(help="Train examples of the slice, of each benchmark and seed.")] = 160,
    override: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Measure every lever; see the top of this file."""
    levers = {"none": ""} | dict(own.split("=", 1) for own in lever)
    run = load_config(str(config), override or [])
    folder.mkdir(parents=True, exist_ok=True)
    dense = once(folder / "dense", lambda out: convert.prepare_dense(run.model, downloads=run.store.downloads, out=out))
    values: dict[tuple[str, str, str], dict[int, np.ndarray]] = {}
    for name, fields in levers.items():
        for seed in seeds or (0, 1):
            seeded = [*(override or []), f"seed={seed}"]
            plain = load_config(str(config), seeded)
            varied = load_config(str(config), [*seeded, *fields.split()])
            pruned = name if fields.startswith(RIVALS) else "none"
            checkpoint = once(folder / f"{seed} pruned {pruned}", partial(cut, varied, dense, ratio))
            for own in run.benchmarks:
                prompts = once(folder / f"{seed} {own.name} prompts", partial(render_into, plain, own, examples))
                soft = None
                if varied.distillation.unlabelled:
                    soft = (
                        once(folder / f"{seed} {own.name} labels", partial(label, varied, own, dense)) / "soft-labels"
                    )
                adapter = once(
                    folder / f"{seed} {own.name} adapter {name}",
                    partial(train, varied, own, checkpoint, prompts / "train" / "prompts", soft),
                )
                for model, attached, of in (("untuned", None, pruned), ("tailored", adapter, name)):
                    out = once(
                        folder / f"{seed} {own.name} {model} {of}",
                        partial(score, plain, own, checkpoint, attached, prompts / "selection" / "prompts"),
                    )
                    values.setdefault((name, model, own.name), {})[seed] = read_score(out).answers.values
            report(folder, values, [own.name for own in run.benchmarks])


def kept(folder: Path, seed: int, benchmark: str) -> np.ndarray:
    """Which examples of the slice are not among the unlabelled prompts, if any were drawn."""
    prompts = read_prompts(folder / f"{seed} {benchmark} prompts" / "selection" / "prompts", "selection")
    labels = folder / f"{seed} {benchmark} labels" / "soft-labels" / "soft_labels.parquet"
    unlabelled = pd.read_parquet(labels)["example"] if labels.exists() else []
    return ~np.isin([prompt.example for prompt in prompts], unlabelled)


def report(folder: Path, values: dict[tuple[str, str, str], dict[int, np.ndarray]], benchmarks: list[str]) -> None:
    """Print what is there: the accuracy of each variant, and its gain over the run without levers."""
    rows = []
    for name, model in dict.fromkeys((name, model) for name, model, _ in values):
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        row: dict[str, Any] = {}
        for own in benchmarks:
            by_seed = values.get((name, model, own), {})
            pairs += [
                (v[w], values["none", model, own][s][w]) for s, v in by_seed.items() for w in [kept(folder, s, own)]
            ]
            row |= {own: np.concatenate([*by_seed.values()]).mean()} if by_seed else {}
        ours, theirs = (np.concatenate(part).astype(float) for part in zip(*pairs, strict=True))
        gain = ours - theirs
        figures = {"examples": len(gain), "accuracy": ours.mean(), "gain": gain.mean()}
        rows.append({"lever": name, "model": model} | figures | {"error": gain.std(ddof=1) / len(gain) ** 0.5} | row)
    table = pd.DataFrame(rows)
    table.to_csv(folder / "levers.csv", index=False)
    print(table.round(4).to_string(), flush=True)


if __name__ == "__main__":
    typer.run(main)
