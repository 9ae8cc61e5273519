"""CPU seconds of lm-evaluation-harness's model `hf`, and of the model `tailored` in its place.

    python tests/performance/harness_model.py CHECKPOINT

The requests are those of the harness's own tasks, over local rows of evenly spaced documents. Both models answer them,
in turn, from texts to log-likelihoods, with the same weights in float32. The seconds are those of the process, on all
of its threads, so that other processes count little; of several repetitions the fewest count. Prints a table; exits
with 1 when a prediction or a greedy flag differs, a log-likelihood differs by more than 1e-3, or `tailored` took as
long as `hf`.

Protocols: those of scoring.py; then `all at once`, where the requests of all benchmarks, 5-shot with one header each,
are one call, as they are when the harness runs several tasks.
"""

import math
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from scoring import PROTOCOLS, Requests, documents
from tailored_llama.console import quiet_libraries
from tailored_llama.serving.lm_eval_model import TailoredLM

TOLERANCE = 1e-3
Answers = list[list[tuple[float, bool]]]  # for each document: log-likelihood and greedy flag of each choice


def answer(lm: HFLM, asked: Requests) -> tuple[Answers, float]:
    """A model's answers, and the CPU seconds they took."""
    instances = [
        Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pair for pairs in asked for pair in pairs)
    ]
    start = time.process_time()
    found = iter(lm.loglikelihood(instances, disable_tqdm=True))
    spent = time.process_time() - start
    return [[next(found) for _ in pairs] for pairs in asked], spent


def measure(models: dict[str, HFLM], asked: Requests, repetitions: int) -> dict[str, Any]:
    """One row of the table."""
    found: dict[str, Answers] = {}
    seconds = dict.fromkeys(models, math.inf)
    for _ in range(repetitions):
        for name, lm in models.items():
            found[name], spent = answer(lm, asked)
            seconds[name] = min(seconds[name], spent)
    values, greedy = (
        {name: [[choice[part] for choice in row] for row in rows] for name, rows in found.items()} for part in (0, 1)
    )
    pairs = list(zip(values["hf"], values["tailored"], strict=True))
    return {
        "documents": len(asked),
        "hf_seconds": seconds["hf"],
        "tailored_seconds": seconds["tailored"],
        "ratio": seconds["hf"] / seconds["tailored"],
        "difference": max(float(np.abs(np.subtract(*pair)).max()) for pair in pairs),
        "parted": sum(int(np.argmax(one)) != int(np.argmax(other)) for one, other in pairs),
        "greedy_parted": sum(one != other for one, other in zip(greedy["hf"], greedy["tailored"], strict=True)),
    }


def main(
    checkpoint: Path,
    benchmark: Annotated[list[str], typer.Option(help="Repeatable.")] = ["arc_easy", "piqa", "winogrande"],  # noqa: B006
    count: Annotated[int, typer.Option("--documents", help="Documents of each benchmark.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Rows in a pass of `hf`.")] = 16,
    repetitions: Annotated[int, typer.Option(help="Of each measurement, in turn.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    options = {"device": "cpu", "dtype": "float32", "batch_size": batch_size}
    models = {name: kind(str(checkpoint), **options) for name, kind in (("hf", HFLM), ("tailored", TailoredLM))}
    asked = {(kind, name): documents(name, *PROTOCOLS[kind], count) for kind in PROTOCOLS for name in benchmark}
    asked["all at once", "all"] = [row for name in benchmark for row in asked["5-shot, one header", name]]
    rows = []
    for (kind, name), requests in asked.items():
        rows.append({"protocol": kind, "benchmark": name} | measure(models, requests, repetitions))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    equal = table["difference"].max() < TOLERANCE and not table[["parted", "greedy_parted"]].to_numpy().any()
    good = equal and table["ratio"].min() > 1
    print("equal, and sooner" if good else "NOT equal" if not equal else "equal, but no sooner")
    raise typer.Exit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
