"""What whole layers that leave do to speed and perplexity, beside heads and channels of the same ratio.

    python tests/performance/depth.py OUT --layers 0 --layers 3 --layers 6 --set model.dtype=bfloat16

Everything is kept in OUT, and found again, so the command can be stopped, and continued with more layers. Each model
takes turns with the dense one. The first text of perplexity resembles the calibration text, the second does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from allocation import kept_in
from tailored_llama.config import PerplexityConfig, ProfileConfig, RunConfig, load_config
from tailored_llama.evaluation import ProfileSettings, read_metrics, read_profile
from tailored_llama.models import read_structure
from tailored_llama.pipeline import STAGES, Artifact, Runner, steps

TEXTS = {
    "passages": PerplexityConfig(source="boolq", window=1024, tokens=8192),
    "questions": PerplexityConfig(source="hellaswag", column="query", split="train", window=1024, tokens=8192),
}


def main(
    out: Path,
    layers: Annotated[list[int], typer.Option(help="Whole layers that leave; −1: nothing but layers. Repeatable.")],
    ratio: float = 0.2,
    repeats: int = 9,
    new_tokens: int = 32,
    overrides: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    run = load_config(None, overrides or [])
    runner = kept_in(out, run)
    dense = steps.load_dense(runner, run)
    print("| layers removed | parameters | " + " | ".join(TEXTS) + " | reading | writing |")
    print(_row(runner, run, "dense", dense))
    profile = ProfileConfig(batches=(1,), new_tokens=new_tokens, repeats=repeats)
    for number in layers:
        name = {-1: "layers alone", 0: "0: heads and channels alone"}.get(number, str(number))
        kinds = {-1: ["layer"], 0: ["attention", "mlp"]}.get(number, ["attention", "mlp", "layer"])
        changes = [f"pruning.kinds={json.dumps(kinds)}", f"pruning.layers={max(0, number)}"]
        own = load_config(None, [*(overrides or []), *changes, f"pruning.ratios=[{ratio}]"])
        pruned = steps.prune_to(runner, own, steps.prepare_dense(runner, own, steps.Prompts()), ratio)
        settings = ProfileSettings.of(profile, own.execution.device)
        timed = runner(STAGES["profile"], settings, f"profile {name}", checkpoint=pruned, against=dense)
        print(_row(runner, own, name, pruned, timed))


def _row(runner: Runner, run: RunConfig, name: str, checkpoint: Artifact, timed: Artifact | None = None) -> str:
    structure = read_structure(runner.open(checkpoint))
    cells = [f"{name} ({len(structure.layers)} left)", f"{structure.parameters:,}"]
    for label, text in TEXTS.items():
        own = run.model_copy(update={"perplexity": text})
        perplexity = steps.measure_perplexity(runner, own, f"{name}, {label}", checkpoint)
        cells.append(f"{read_metrics(runner.open(perplexity))['perplexity']:.1f}")
    if timed:
        row = read_profile(runner.open(timed))[0]
        for phase in ("prefill", "decode"):
            ratio, low, high = (getattr(row, f"{phase}_speedup{part}") for part in ("", "_low", "_high"))
            cells.append(f"{ratio:.2f} × ({low:.2f}–{high:.2f})")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    typer.run(main)
