"""Score every rung of a search on all evaluation rows: the truth that error_rates.py draws from.

    python tests/performance/ladders.py data/smallest.toml ladders.toml --set 'goal.types=["q8_0"]'
    python tests/performance/error_rates.py ladders.toml

Each ratio of every base model is made as a search makes it, and scored in every type of file. Everything is kept in
the store of the configuration, and found again. Several calls may append to one file.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from tailored_llama.config import SmallestConfig, load_config
from tailored_llama.evaluation import Rung
from tailored_llama.models import read_structure
from tailored_llama.pipeline import StoreExecutor
from tailored_llama.pipeline.candidates import scores
from tailored_llama.pipeline.smallest import Search, measure, start


def main(
    config: Path, out: Path, overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None
) -> None:
    run_config = load_config(config, overrides, SmallestConfig)
    run = StoreExecutor(run_config.store, run_config.execution)
    state = start(run, run_config)
    reference = scores(state.reference, "evaluation")
    sixteen_bits = 2 * read_structure(run.open(state.reference.checkpoint)).parameters
    first = True
    for number, (base, kind) in enumerate(state.ladders):
        if kind == "source":  # one file, and no ladder
            continue
        rungs = [Rung(number, place) for place in range(len(base.steps))]
        for rung in rungs:  # one after another: each is followed by its scores
            measure(state, [rung])
        scored = {rung: scores(state.tried[rung], "evaluation") for rung in rungs if rung in state.tried}
        for benchmark in base.prompts.evaluation:
            if first:
                write(out, state, benchmark, [(run.open(reference[benchmark]), "the reference", sixteen_bits)])
            rows = [
                (run.open(own[benchmark]), state.tried[rung].label, state.tried[rung].measured.bytes)
                for rung, own in scored.items()
            ]
            write(out, state, benchmark, rows)
        first = False


def write(out: Path, state: Search, benchmark: str, rungs: list[tuple[Path, str, int]]) -> None:
    """Append a ladder: the scores, label and bytes of its rungs."""
    lines = [f"    {{scores = {json.dumps(str(scores))}, cost = {cost}}},  # {label}" for scores, label, cost in rungs]
    head = {"model": state.bases[0].config.model.short_name, "benchmark": benchmark}
    text = ["[[ladder]]", *(f"{name} = {json.dumps(value)}" for name, value in head.items()), "rungs = [", *lines, "]"]
    with out.open("a") as file:
        file.write("\n".join(text) + "\n\n")


if __name__ == "__main__":
    typer.run(main)
