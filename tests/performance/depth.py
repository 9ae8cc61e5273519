"""What whole layers that leave do to speed and perplexity, beside heads and channels of the same ratio.

    python tests/performance/depth.py OUT --layers 0 --layers 3 --layers 6 --set model.dtype=bfloat16

Folders of OUT that exist are not made again, so the command can be stopped, and continued with more layers. Each model
takes turns with the dense one. The first text of perplexity resembles the calibration text, the second does not.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tailored_llama.cli.folders import new_folder, subfolder
from tailored_llama.cli.stages import prune_in_steps
from tailored_llama.config import PerplexityConfig, ProfileConfig, RunConfig, load_config
from tailored_llama.evaluation import perplexity, profiling, read_metrics, read_profile
from tailored_llama.models import prepare_dense, read_structure

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
    out.mkdir(exist_ok=True)
    if not (dense := out / "dense").exists():
        with new_folder(dense) as folder:
            prepare_dense(run.model, downloads=run.store.downloads, out=folder)
    print("| layers removed | parameters | " + " | ".join(TEXTS) + " | reading | writing |")
    print(_row("dense", dense, dense, run, None))
    profile = ProfileConfig(batches=(1,), new_tokens=new_tokens, repeats=repeats)
    for number in layers:
        name = {-1: "layers alone", 0: "0: heads and channels alone"}.get(number, str(number))
        kinds = {-1: ["layer"], 0: ["attention", "mlp"]}.get(number, ["attention", "mlp", "layer"])
        changes = [f"pruning.kinds={json.dumps(kinds)}", f"pruning.layers={max(0, number)}"]
        own = load_config(None, [*(overrides or []), *changes, f"pruning.ratios=[{ratio}]"])
        if not (pruned := out / f"pruned-{number}").exists():
            with new_folder(pruned) as folder, tempfile.TemporaryDirectory() as scratch:
                prune_in_steps(own, dense, ratio, partial(subfolder, Path(scratch)), folder)
        print(_row(name, pruned, dense, own, profile))


def _row(name: str, checkpoint: Path, dense: Path, run: RunConfig, profile: ProfileConfig | None) -> str:
    structure = read_structure(checkpoint)
    cells = [f"{name} ({len(structure.layers)} left)", f"{structure.parameters:,}"]
    for label, text in TEXTS.items():
        if not (folder := checkpoint.with_name(f"{checkpoint.name}-{label}")).exists():
            with new_folder(folder) as new:
                perplexity.measure_perplexity(
                    checkpoint, text=text, downloads=run.store.downloads, out=new, execution=run.execution
                )
        cells.append(f"{read_metrics(folder)['perplexity']:.1f}")
    if profile:
        if not (folder := checkpoint.with_name(f"{checkpoint.name}-profile")).exists():
            with new_folder(folder) as new:
                profiling.profile_checkpoint(checkpoint, dense, profile=profile, out=new, execution=run.execution)
        row = read_profile(folder)[0]
        for phase in ("prefill", "decode"):
            ratio, low, high = (getattr(row, f"{phase}_speedup{part}") for part in ("", "_low", "_high"))
            cells.append(f"{ratio:.2f} × ({low:.2f}–{high:.2f})")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    typer.run(main)
