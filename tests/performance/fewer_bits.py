"""What few bits cost, rounded plainly, by an importance matrix and for a job: differences to a model's own 16 bits.

    PYTHONPATH=tests python tests/performance/fewer_bits.py FOLDER 'Gemma 3 270M=CHECKPOINT' … [--benchmark piqa …] \
        [--limit 500]

The prompts that a run would tune on are what a file is rounded for. Choices are ranked by the file's weights in
transformers. `FOLDER/fewer-bits.csv` gets a row for each file and benchmark; what is in the folder is not measured
again. The differences of `mean` are those over all benchmarks, each of which counts alike.
"""

import csv
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer

from tailored_llama.config import GgufType, RunConfig, validate_config
from tailored_llama.data import Prompt, encode_prompt, loglikelihoods, read_prompts
from tailored_llama.evaluation.scores import hits
from tailored_llama.evaluation.scoring import predict
from tailored_llama.models import context_length, load_model, load_tokenizer
from tailored_llama.pipeline import FolderExecutor, steps
from tailored_llama.serving.export import dequantise
from tailored_llama.serving.gguf import write_gguf
from tailored_llama.serving.job import Job, importance_of, job_of

PLAIN, MATRIX, JOB = "plain", "importance matrix", "for the job"
FILES: list[tuple[GgufType, str]] = [
    ("iq4_nl", JOB), ("q4_0", PLAIN), ("q4_k_m", MATRIX), ("iq4_nl", MATRIX), ("q4_0", JOB), ("q8_0", PLAIN),
    ("iq4_nl", PLAIN),
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A file on a benchmark, against 16 bits: points of accuracy, and the divergence of its choices in nats."""

    model: str
    benchmark: str
    type: str
    rounded: str
    megabytes: float
    rows: int
    accuracy: float
    difference: float
    error: float
    divergence: float
    writing: float  # seconds
    scoring: float


def main(
    folder: Path,
    checkpoints: list[str],
    benchmarks: Annotated[list[str], typer.Option("--benchmark")] = ["csqa", "arc_easy", "piqa", "hellaswag"],  # noqa: B006
    limit: int = 500,
) -> None:
    folder.mkdir(exist_ok=True)
    rows: list[Row] = []
    for given in checkpoints:
        model, _, checkpoint = given.partition("=")
        for benchmark in benchmarks:
            own = {"benchmarks": [benchmark], "model": {"source": checkpoint}, "scoring": {"limit": limit}}
            rows += measure(folder, model, Path(checkpoint), validate_config(own))
        rows += means([row for row in rows if row.model == model])
    with (folder / "fewer-bits.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(map(asdict, rows))


def measure(folder: Path, model: str, checkpoint: Path, run: RunConfig) -> list[Row]:
    """All files of a model on one benchmark, which is their job."""
    name, rows = run.benchmarks[0].name, list[Row]()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        runner = FolderExecutor(Path(scratch), run.store.downloads, run.execution)
        prompts = steps.render_all(run)
        asked = read_prompts(runner.open(prompts.evaluation[name]), "evaluation")
        job = job_of(checkpoint, {name: runner.open(prompts.train[name])}, run.execution)
        assert job
        print(model, name, len(asked), "rows;", len(job.documents), "prompts,", sum(map(len, job.documents)), "tokens")
        reference = read(folder, f"{model}-{name}-bf16", partial(score, checkpoint, asked, 0, 0.0))
        for kind, how in FILES:
            found = read(folder, f"{model}-{name}-{kind}-{how}", partial(write, checkpoint, kind, how, job, asked))
            rows.append(row(model, name, kind, how, asked, reference, found))
            print(rows[-1], flush=True)
    return rows


def read(folder: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured before, or is measured now."""
    if not (file := folder / f"{name.replace(' ', '-')}.json").is_file():
        file.write_text(json.dumps(make()))
    return dict(json.loads(file.read_text()))


def write(checkpoint: Path, kind: GgufType, how: str, job: Job, asked: Sequence[Prompt]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        file, weights, start = Path(scratch) / "model.gguf", Path(scratch) / "weights", time.process_time()
        by = job if how == JOB else importance_of(job, checkpoint, kind, Path(scratch)) if how == MATRIX else None
        write_gguf(checkpoint, gguf_type=kind, out=file, by=by)
        seconds = time.process_time() - start
        weights.mkdir()
        dequantise(checkpoint, file, kind, weights)
        return score(weights, asked, file.stat().st_size, seconds)


def score(checkpoint: Path, asked: Sequence[Prompt], size: int, writing: float) -> dict[str, Any]:
    model, tokenizer, start = load_model(checkpoint), load_tokenizer(checkpoint), time.process_time()
    encoded = [encode_prompt(tokenizer, prompt, context_length(model)) for prompt in asked]
    found = loglikelihoods(model, encoded, 1024)
    return {"scores": found, "bytes": size, "writing": writing, "scoring": time.process_time() - start}


def row(
    model: str,
    name: str,
    kind: str,
    how: str,
    asked: Sequence[Prompt],
    reference: dict[str, Any],
    found: dict[str, Any],
) -> Row:
    before, after = (hits(predict(asked, own["scores"]))["acc_norm"] for own in (reference, found))
    differences = 100 * (after - before)
    divergences = [
        float((p.exp() * (p - q)).sum())
        for p, q in (
            (torch.tensor(own).double().log_softmax(-1) for own in pair)
            for pair in zip(reference["scores"], found["scores"], strict=True)
        )
    ]
    error = differences.std(ddof=1) / len(asked) ** 0.5
    sizes = found["bytes"] / 1e6, len(asked), float(after.mean()), float(differences.mean()), float(error)
    return Row(model, name, kind, how, *sizes, fmean(divergences), found["writing"], found["scoring"])


def means(rows: Sequence[Row]) -> Iterator[Row]:
    """Every file over all benchmarks, which count alike."""
    for kind, how in FILES:
        own = [row for row in rows if (row.type, row.rounded) == (kind, how)]
        mean = {f.name: fmean(getattr(row, f.name) for row in own) for f in fields(Row) if f.type is float}
        error = sum(row.error**2 for row in own) ** 0.5 / len(own)
        yield replace(own[0], benchmark="mean", **mean | {"error": error, "rows": sum(row.rows for row in own)})


if __name__ == "__main__":
    typer.run(main)
