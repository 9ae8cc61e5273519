"""How much text a file is rounded for: a run's own prompts, with its calibration text, and with further train examples.

    PYTHONPATH=tests:tests/performance python tests/performance/rounding_text.py FOLDER 'SmolLM2 135M=CHECKPOINT' …

The files are scored by their weights in transformers, on train examples that neither tuning nor a run's choice of
settings reads, nor any rounding here. `FOLDER/rounding-text.csv` gets a row for each file: what it loses against the
checkpoint's own 16 bits, and by how much its choices diverge from them. What is in the folder already is not measured
again.
"""

import csv
import random
import tempfile
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fewer_bits import COLUMNS, JOB, kept, read, row, scored, write
from tailored_llama.config import GgufType, validate_config
from tailored_llama.data import PromptSettings, draw_train, encode_prompt, load_template, render, without
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.models import load_tokenizer
from tailored_llama.pipeline import FolderExecutor, steps
from tailored_llama.serving.export import dequantise
from tailored_llama.serving.job import job_of

SKIP = 1000  # train examples, as train_slice.py
FURTHER = (300, 1500)


def main(
    folder: Path,
    checkpoints: list[str],
    benchmark: str = "csqa",
    limit: int = 1000,
    gguf_type: Annotated[str, typer.Option("--type")] = "iq4_nl",
) -> None:
    folder.mkdir(exist_ok=True)
    kind: GgufType = gguf_type  # type: ignore[assignment]
    rows = []
    for given in checkpoints:
        model, _, source = given.partition("=")
        checkpoint, own = Path(source), folder / f"{model}-{benchmark}-{kind}".replace(" ", "-")
        own.mkdir(exist_ok=True)
        run = validate_config({"benchmarks": [benchmark], "model": {"source": source}})
        (asking,) = run.benchmarks
        train = load_examples(asking, "train", run.store.downloads)
        _, tuned, held = draw_train(PromptSettings.of(run, asking, "train"), train)
        rest = without(train, tuned + held)
        random.Random(run.seed).shuffle(rest)
        template, tokenizer = load_template(run.prompts.template), load_tokenizer(checkpoint)
        asked = {benchmark: [render(asking, template, example) for example in rest[SKIP : SKIP + limit]]}
        further = [
            encode_prompt(tokenizer, render(asking, template, example), 4096).document
            for example in rest[SKIP + limit :][: max(FURTHER)]
        ]
        with tempfile.TemporaryDirectory(dir=own) as scratch:
            runner = FolderExecutor(Path(scratch), run.store.downloads, run.execution)
            job = job_of(checkpoint, {benchmark: runner.open(steps.render_all(run).train[benchmark])}, run.execution)
            assert job
            jobs = {"prompts": job}
            jobs |= {f"and {n} further": replace(job, documents=[*job.documents, *further[:n]]) for n in FURTHER}
            before = scored(own / "bf16", checkpoint, asked)
            for name, by in jobs.items():
                file = own / name.replace(" ", "-")
                print(f"{model}, {name}: {sum(map(len, by.documents))} tokens", flush=True)
                written = read(
                    file.with_suffix(".json"), partial(write, checkpoint, kind, JOB, by, file.with_suffix(".gguf"))
                )
                (weights := Path(scratch) / file.name).mkdir()
                if not all(path.is_file() for path in kept(file, asked)):
                    dequantise(checkpoint, file.with_suffix(".gguf"), weights)
                after = scored(file, weights, asked)
                found = row(
                    model, benchmark, kind, name, asked[benchmark], before[benchmark], after[benchmark] | written
                )
                rows.append(found)
                print(found, flush=True)
    with (folder / "rounding-text.csv").open("w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(
            [f"{v:{digits}}" for v, digits in zip(astuple(row), COLUMNS.values(), strict=True)] for row in rows
        )


if __name__ == "__main__":
    typer.run(main)
