"""Which kind of matrix deserves more bits: one kind after another in a wider type, against megabytes.

    PYTHONPATH=tests:tests/performance python tests/performance/tensor_types.py FOLDER 'SmolLM2 135M=CHECKPOINT' …

The files are rounded for the benchmark's train prompts, as a run does, and scored by their weights in transformers, on
train examples that neither tuning nor a run's choice of settings reads. `FOLDER/tensor-types.csv` gets a row for each
file: what it loses against the checkpoint's own 16 bits, and by how much its choices diverge from them. What is in the
folder already is not measured again.
"""

import csv
import random
import re
import tempfile
from collections.abc import Container
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer
from gguf import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind

from fewer_bits import COLUMNS, JOB, kept, read, row, scored, write
from tailored_llama.config import GgufType, validate_config
from tailored_llama.data import PromptSettings, draw_train, load_template, render, without
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.pipeline import FolderExecutor, steps
from tailored_llama.serving import gguf
from tailored_llama.serving.export import dequantise
from tailored_llama.serving.gguf_layout import Layout, Part, parts_of
from tailored_llama.serving.job import job_of

KINDS = {
    "embedding": r"^(token_embd|output)\.",
    "attention": r"attn_(q|k|v|output)\.",
    "gate and up": r"ffn_(gate|up)\.",
    "down": r"ffn_down\.",
}
LOW: GgufType = "iq4_nl"
MIDDLE, HIGH = "q5_0", "q8_0"
SKIP = 1000  # train examples, as train_slice.py


def raised(
    pattern: str, to: str, checkpoint: Path, layout: Layout, gguf_type: GgufType, weighed: Container[str] = ()
) -> list[Part]:
    """The parts of a file, of which those that match a pattern have a wider type."""
    wide = Kind[to.upper()]
    return [
        part._replace(kind=wide)
        if len(part.shape) > 1 and re.search(pattern, part.tensor) and not part.shape[-1] % GGML_QUANT_SIZES[wide][0]
        else part
        for part in parts_of(checkpoint, layout, gguf_type, weighed)
    ]


def main(folder: Path, checkpoints: list[str], benchmark: str = "csqa", limit: int = 500) -> None:
    folder.mkdir(exist_ok=True)
    nothing, everything = "(?!)", ""
    files = {f"all {LOW}": (nothing, HIGH)}
    files |= {f"{kind} {wide}": (own, wide) for wide in (HIGH, MIDDLE) for kind, own in KINDS.items()}
    files |= {f"all {wide}": (everything, wide) for wide in (MIDDLE, HIGH)}
    rows = []
    for given in checkpoints:
        model, _, source = given.partition("=")
        checkpoint, own = Path(source), folder / model.replace(" ", "-")
        own.mkdir(exist_ok=True)
        run = validate_config({"benchmarks": [benchmark], "model": {"source": source}})
        (asking,) = run.benchmarks
        train = load_examples(asking, "train", run.store.downloads)
        _, tuned, held = draw_train(PromptSettings.of(run, asking, "train"), train)
        rest = without(train, tuned + held)
        random.Random(run.seed).shuffle(rest)
        template = load_template(run.prompts.template)
        asked = {benchmark: [render(asking, template, example) for example in rest[SKIP : SKIP + limit]]}
        with tempfile.TemporaryDirectory(dir=own) as scratch:
            runner = FolderExecutor(Path(scratch), run.store.downloads, run.execution)
            prompts = runner.open(steps.render_all(run).train[benchmark])
            job = job_of(checkpoint, {benchmark: prompts}, run.execution)
            assert job
            before = scored(own / "bf16", checkpoint, asked)
            for name, (pattern, wide) in files.items():
                file = own / f"{name.replace(' ', '-')}"
                layout: Any = partial(raised, pattern, wide)
                with patch.object(gguf, "parts_of", layout):
                    made = partial(write, checkpoint, LOW, JOB, job, file.with_suffix(".gguf"))
                    written = read(file.with_suffix(".json"), made)
                    (weights := Path(scratch) / file.name).mkdir()
                    if not all(path.is_file() for path in kept(file, asked)):
                        dequantise(checkpoint, file.with_suffix(".gguf"), weights)
                after = scored(file, weights, asked)
                found = row(
                    model, benchmark, name, JOB, asked[benchmark], before[benchmark], after[benchmark] | written
                )
                rows.append(found)
                print(found, flush=True)
    with (folder / "tensor-types.csv").open("w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(
            [f"{v:{digits}}" for v, digits in zip(astuple(row), COLUMNS.values(), strict=True)] for row in rows
        )


if __name__ == "__main__":
    typer.run(main)
