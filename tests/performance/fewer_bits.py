"""What few bits cost, rounded plainly, by an importance matrix and for a job: differences to a model's own 16 bits.

    PYTHONPATH=tests python tests/performance/fewer_bits.py FOLDER 'Gemma 3 270M=CHECKPOINT' … [--benchmark piqa …] \
        [--limit 500]

Each file is rounded for all benchmarks at once: for the prompts that a run with its defaults would tune on. Choices are
ranked by the file's weights in transformers. `FOLDER/fewer-bits.csv` gets a row for each file and benchmark, and their
mean; what is in the folder already is not measured again.
"""

import csv
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cache, partial
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
    ("iq4_nl", JOB), ("q4_0", PLAIN), ("q8_0", PLAIN), ("q4_k_m", MATRIX), ("q4_0", JOB), ("iq4_nl", MATRIX),
    ("iq4_nl", PLAIN),
]  # fmt: skip


COLUMNS = {
    "model": "", "benchmark": "", "type": "", "rounded": "", "MB": ".0f", "examples": "", "acc_norm": ".3f",
    "points": "+.1f", "points error": ".1f", "divergence": ".3f", "seconds to write": ".0f", "seconds to score": ".0f",
}  # fmt: skip


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
        own = {"benchmarks": benchmarks, "model": {"source": checkpoint}, "scoring": {"limit": limit}}
        rows += measure(folder / model.replace(" ", "-"), model, Path(checkpoint), validate_config(own))
        with (folder / "fewer-bits.csv").open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(COLUMNS)
            table.writerows(
                [f"{v:{digits}}" for v, digits in zip(astuple(row), COLUMNS.values(), strict=True)] for row in rows
            )


def measure(folder: Path, model: str, checkpoint: Path, run: RunConfig) -> list[Row]:
    """All files of a model on all benchmarks, which are its job together."""
    folder.mkdir(exist_ok=True)
    rows = list[Row]()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        runner, prompts = FolderExecutor(Path(scratch), run.store.downloads, run.execution), steps.render_all(run)
        asked = {name: read_prompts(runner.open(own), "evaluation") for name, own in prompts.evaluation.items()}
        job = job_of(checkpoint, {name: runner.open(own) for name, own in prompts.train.items()}, run.execution)
        assert job
        print(f"{model}: {len(job.documents)} prompts, {sum(map(len, job.documents))} tokens", flush=True)
        before = scored(folder / "bf16", checkpoint, asked)
        for kind, how in FILES:
            name = folder / f"{kind}-{how.replace(' ', '-')}"
            found = read(
                name.with_suffix(".json"), partial(write, checkpoint, kind, how, job, name.with_suffix(".gguf"))
            )
            (weights := Path(scratch) / name.name).mkdir()
            if not all(path.is_file() for path in kept(name, asked)):
                dequantise(checkpoint, name.with_suffix(".gguf"), weights)
            after = scored(name, weights, asked)
            own = [row(model, one, kind, how, asked[one], before[one], after[one] | found) for one in asked]
            rows += own
            if len(own) > 1:
                mean = {f.name: fmean(getattr(one, f.name) for one in own) for f in fields(Row) if f.type is float}
                error = sum(one.error**2 for one in own) ** 0.5 / len(own)
                rows.append(replace(own[0], benchmark="mean", **mean | {"error": error}))
            print(rows[-1], flush=True)
    return rows


def read(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured before, or is measured now."""
    if not file.is_file():
        file.write_text(json.dumps(make()))
    return dict(json.loads(file.read_text()))


def write(checkpoint: Path, kind: GgufType, how: str, job: Job, file: Path) -> dict[str, Any]:
    """Write a file, and say its bytes and the seconds of processor time."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        by = job if how == JOB else importance_of(job, checkpoint, Path(scratch)) if how == MATRIX else None
        write_gguf(checkpoint, gguf_type=kind, out=file, by=by)
    return {"bytes": file.stat().st_size, "writing": time.process_time() - start}


def kept(name: Path, asked: Iterable[str]) -> list[Path]:
    """Where the scores of a file on each benchmark are kept."""
    return [name.with_name(f"{name.name}-{one}.json") for one in asked]


def scored(name: Path, checkpoint: Path, asked: Mapping[str, Sequence[Prompt]]) -> dict[str, dict[str, Any]]:
    """The log-likelihoods of all choices by benchmark, and the seconds that they took."""
    load = cache(lambda: (load_model(checkpoint), load_tokenizer(checkpoint)))

    def score(prompts: Sequence[Prompt]) -> dict[str, Any]:
        model, tokenizer = load()
        start = time.process_time()
        found = loglikelihoods(model, [encode_prompt(tokenizer, own, context_length(model)) for own in prompts], 1024)
        return {"scores": found, "scoring": time.process_time() - start}

    return {one: read(file, partial(score, asked[one])) for one, file in zip(asked, kept(name, asked), strict=True)}


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


if __name__ == "__main__":
    typer.run(main)
