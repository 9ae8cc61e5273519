"""What proving by llama.cpp itself takes beside scoring a file's weights in transformers, and how often both agree.

    python tests/performance/served.py ROWS.csv [--model smollm2-135m-instruct] [--type q8_0] [--shots 0] [--limit 300]

Every way answers the same rows in turns, on torch's threads: transformers ranks the labels with the dequantised
weights, and llama.cpp's server is asked by chat with the grammar. Printed are the seconds of CPU time of this process
and its children, which other work disturbs little, the accuracy, and the share of rows answered as by transformers.
`--shots` tunes the model first.
"""

import resource
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tailored_llama.config import validate_config
from tailored_llama.evaluation import ScoreSettings, read_chosen, read_metrics
from tailored_llama.pipeline import FolderExecutor, stages, steps
from tailored_llama.serving import GgufSettings, QuantisedSettings


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main(
    rows: Path,
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    type: Annotated[str, typer.Option()] = "q8_0",
    shots: Annotated[int, typer.Option()] = 0,
    limit: Annotated[int, typer.Option()] = 300,
) -> None:
    settings = {"benchmarks": [str(rows)], "model": {"source": model}, "scoring": {"limit": limit}}
    config = validate_config(settings | {"tuning": {"shots": shots or 50, "held_out": 0}})
    (benchmark,) = config.benchmarks
    with tempfile.TemporaryDirectory() as folder:
        run = FolderExecutor(Path(folder), config.store.downloads, config.execution)
        dense, examples = steps.load_dense(config), steps.load_examples(benchmark)
        prompts = {split: steps.render(config, benchmark.name, split, examples) for split in ("train", "evaluation")}
        shown = steps.Prompts(train={benchmark.name: prompts["train"]}, shots={benchmark.name: prompts["train"]})
        adapter = steps.tune(config, [benchmark.name], 0.0, dense, shown) if shots else None
        written = GgufSettings(type, benchmark.name)
        inputs: dict[str, Any] = {
            "checkpoint": dense,
            "adapter": adapter,
            "prompts": {benchmark.name: prompts["train"]},
        }
        file = stages.gguf("write", settings=written, **inputs)
        run.open(file)
        asked = {"checkpoint": dense, "gguf": file, "prompts": prompts["evaluation"]}
        ways = {
            "transformers": stages.quantised("rank", settings=QuantisedSettings.of(benchmark, type), **asked),
            "chat": stages.served("ask", settings=ScoreSettings.of(benchmark), **asked),
        }
        first: dict[int, int | str] = {}
        for name, way in ways.items():
            start = cpu_seconds()
            scores = run.open(way)
            took, found = cpu_seconds() - start, read_chosen(scores, "acc")
            first = first or found
            same = np.mean([first[example] == found[example] for example in first])
            measured = read_metrics(scores)
            accuracy = f"{measured['acc']:.3f} ± {measured['acc_stderr']:.3f}"
            print(f"{name}: {took:.0f} CPU seconds, accuracy {accuracy}, {same:.1%} as transformers")


if __name__ == "__main__":
    typer.run(main)
