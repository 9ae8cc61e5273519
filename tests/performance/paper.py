"""The paper's setting beside ours: what its ratios are of all parameters, what a 7B model costs, and our columns.

    python tests/performance/paper.py ratios
    python tests/performance/paper.py estimate
    python tests/performance/paper.py fill REPORT "SmolLM2 135M"    # REPORT: the folder with recovery.parquet

`fill` writes the rows of one model into docs/results/paper.csv, from the report of `tailored-llama run
data/paper.toml`, and leaves the other models' rows as they are. Then `make pages`.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tailored_llama.config import load_config
from tailored_llama.evaluation import MEAN, RecoveryRow, read_recovery

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "results" / "paper.csv"
NAMES = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
    MEAN: "mean",
}
# Rows of each evaluation split, and tokens of a row with all its choices (SmolLM2's tokenizer, template `task`).
ROWS = {"boolq": 3270, "piqa": 1838, "hellaswag": 10042, "winogrande": 1267}
ROWS |= {"arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500}
TOKENS = {"boolq": 154, "piqa": 50, "hellaswag": 164, "winogrande": 39, "arc_easy": 39, "arc_challenge": 49}
TOKENS |= {"openbookqa": 23}
app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Shape:
    """LLaMA-7B's widths."""

    layers: int = 32
    hidden: int = 4096
    channels: int = 11008
    vocabulary: int = 32000

    @property
    def layer(self) -> int:
        """Parameters of a layer that leave with its heads and channels: all but its two norms."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.channels

    @property
    def parameters(self) -> int:
        return self.layers * (self.layer + 2 * self.hidden) + 2 * self.vocabulary * self.hidden + self.hidden

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on all seven projections."""
        attention, mlp = 4 * 2 * self.hidden, 3 * (self.hidden + self.channels)
        return self.layers * rank * (attention + mlp)


@app.command()
def ratios(first: int = 4, last: int = 2) -> None:
    """What share of all parameters LLM-Pruner's ratios remove; they count groups of the layers in between."""
    shape = Shape()
    for called, ratio in (("20 %", 0.25), ("50 %", 0.5)):
        removed = ratio * (shape.layers - first - last) * shape.layer
        left = shape.parameters - removed
        left_of = f"{left / 1e9:.2f} of {shape.parameters / 1e9:.2f} billion parameters left"
        print(f"{called}: --pruning_ratio {ratio}: {left_of}, {removed / shape.parameters:.1%} of all removed")


@app.command()
def estimate(
    rate: Annotated[float, typer.Option(help="TFLOP/s of the device in bfloat16; an A100's are 312.")] = 312,
    scoring: Annotated[float, typer.Option(help="Share of it in scoring, assumed.")] = 0.4,
    tuning: Annotated[float, typer.Option(help="Share of it in tuning, whose batches are small; assumed.")] = 0.2,
    reading: Annotated[float, typer.Option(help="GB/s at which weights are loaded, assumed.")] = 1.0,
) -> None:
    """Time and memory of data/paper.toml on one GPU: an estimate, by counting operations and bytes. Nothing is run."""
    run, shape = load_config(ROOT / "data" / "paper.toml"), Shape()
    sizes = [round((1 - ratio) * shape.parameters) for ratio in run.pruning.ratios]
    tokens = sum(ROWS[one.name] * TOKENS[one.name] for one in run.benchmarks)
    models = shape.parameters + 2 * sum(sizes)  # the dense model once, each pruned one with and without adapters
    score = 2 * models * tokens / (scoring * rate * 1e12)
    epoch = run.tuning.shots * sum(TOKENS[one.name] for one in run.benchmarks)
    held_out = run.tuning.held_out / run.tuning.shots
    tune = run.tuning.epochs * epoch * (4 + 2 * held_out) * sum(sizes) / (tuning * rate * 1e12)
    loads = len(run.benchmarks) * (shape.parameters + 3 * sum(sizes))  # scored, scored with an adapter, tuned
    load = 2 * loads / (reading * 1e9)
    print(f"scoring {tokens / 1e6:.2f} million tokens with each of {1 + 2 * len(sizes)} models: {score / 60:.0f} min")
    print(f"tuning, {run.tuning.epochs} epochs of {epoch:,} tokens at each ratio: {tune / 60:.0f} min")
    print(f"loading {2 * loads / 1e9:.0f} GB of weights: {load / 60:.0f} min")
    print(f"together: {(score + tune + load) / 60:.0f} min; importance and pruning take one or two more")
    adapter = 16 * shape.adapter(run.tuning.rank)
    # What a layer keeps of a token for its gradients: norms and residuals 4, queries, keys and values 3, heads 1,
    # and what dropout leaves of the inputs of six projections 6; 5 of the MLP's channels.
    inner = 14 * shape.hidden + 5 * shape.channels
    activations = 2 * shape.layers * inner * run.tuning.micro_batch_tokens
    tuned = 2 * max(sizes) + adapter + activations
    print(
        f"memory, tuning: {2 * max(sizes) / 1e9:.1f} GB of weights, {adapter / 1e9:.1f} of the adapter and its", end=" "
    )
    print(f"optimiser, {activations / 1e9:.1f} of activations: {tuned / 1e9:.0f} GB")
    print(f"memory, importance and scoring: {2 * shape.parameters / 1e9:.1f} GB of weights and 1 to 3 GB")


@app.command()
def fill(report: Path, model: Annotated[str, typer.Argument(help="As the table names it: 'LLaMA-7B, here'.")]) -> None:
    """Write a model's rows into the table; a run without tuning (tuning.examples = none) gives no tuned ones."""
    rows, models = read_recovery(report)
    sizes = {one.ratio: one.parameters for one in models if one.model in ("dense", "pruned")}
    with TABLE.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    new = []
    for ratio in sorted({row.ratio for row in rows if row.ratio is not None}):
        for state in ("dense", "pruned", "tailored"):
            own = {row.benchmark: row for row in rows if row.ratio == ratio and row.model == state}
            untuned = state == "tailored" and all(row.gain_low == row.gain_high == 0 for row in own.values())
            if own and not untuned and not (state == "dense" and new):
                dense, left = sizes.get(None), sizes.get(ratio)
                share = f"{100 * (1 - left / dense):.1f}" if state != "dense" and dense and left else ""
                new.append(_line(model, "" if state == "dense" else f"{100 * ratio:.0f}", share, state, own))
    first = next((place for place, one in enumerate(table) if one["model"] == model), len(table))
    kept = [one for one in table if one["model"] != model]
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept[:first], *new, *kept[first:]])


def _line(model: str, removed: str, share: str, state: str, own: dict[str, RecoveryRow]) -> dict[str, str]:
    line = {"model": model, "ratio %": removed, "of all parameters %": share}
    line["state"] = {"tailored": "tuned"}.get(state, state)
    for name, title in NAMES.items():
        if (row := own.get(name)) and row.accuracy is not None and row.stderr is not None:
            line |= {title: f"{row.accuracy:.3f}", f"{title} error": f"{row.stderr:.3f}"}
    mean = own.get(MEAN)
    if mean and mean.recovery is not None and mean.recovery_low is not None and mean.recovery_high is not None:
        line["mean recovery %"] = f"{100 * mean.recovery:.1f}"
        line |= {
            "mean recovery low": f"{100 * mean.recovery_low:.0f}",
            "mean recovery high": f"{100 * mean.recovery_high:.0f}",
        }
    if mean:
        line |= {"seeds": str(mean.seed), "examples": str(mean.examples)}
    return line


if __name__ == "__main__":
    app()
