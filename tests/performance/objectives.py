"""What should tuning minimise, with which settings, and when should it stop? Compared by the metric, on train examples.

    python tests/performance/objectives.py FOLDER CHECKPOINT data/quickstart.toml --set tuning.epochs=3 \\
        --vary tuning.ranking=0 --vary tuning.ranking=1 --vary 'tuning.ranking=100 tuning.dropout=0.1'

A pruned checkpoint is tuned to the benchmarks of the configuration, and to two more, which this script writes to files
from train examples:

- `activity`: which of three activities is a text of HellaSwag about?
- `goal`: which of three goals does a solution of PIQA serve?

After every epoch the model answers the held-out examples and a further slice of the train split. Stopping rules see the
held-out examples alone, so one training serves all of them. A gain is the accuracy on the slice minus the untuned
model's, with a paired standard error over examples. The difference is from the first variant's gain, with the epoch of
the lowest held-out loss. Everything is kept in FOLDER, and found again.
"""

import csv
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from common import divided, kept_in
from tailored_llama.config import BenchmarkConfig, RunConfig, Work, load_config
from tailored_llama.data import Example, benchmarks, headline_metric, read_prompts
from tailored_llama.errors import InputError
from tailored_llama.models import add_adapter, context_length, load_tokenizer, open_model
from tailored_llama.pipeline import steps
from tailored_llama.store import read_table
from tailored_llama.training.loop import Course, train
from tailored_llama.training.losses import outcomes
from tailored_llama.training.records import LOG, LOG_SCHEMA, Outcome, is_better, write_comparison
from tailored_llama.training.tuning import encode_sample

BY_LOSS = "objective's loss"
PROMPTS = ("tuning.shots", "tuning.held_out", "tuning.examples")  # rendered once, for all variants
WRITTEN_EXAMPLES, CHOICES = 3000, ("a", "b", "c")


def once(folder: Path, build: Callable[[Path], Any]) -> Path:
    """A folder that is filled now, or was in an earlier run."""
    if not folder.exists():
        scratch = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        facts = build(scratch)
        scratch.rename(folder)
        print(folder.name, facts, flush=True)
    return folder


def split_activity(example: Example) -> tuple[str, str]:
    label, _, text = example.fields["query"].partition(": ")
    return f"{text}\nActivity:", label


def split_goal(example: Example) -> tuple[str, str]:
    return f"Instruction: {example.choices[example.answer]}\nGoal:", example.fields["question"]


def write_task(
    name: str, source: BenchmarkConfig, split: Callable[[Example], tuple[str, str]], downloads: str, out: Path
) -> None:
    """Write a benchmark of one's own, as two files; the wrong choices are the right ones of other examples."""
    rng = random.Random(0)
    examples = [one for one in benchmarks.load_examples(source, "train", downloads) if one.answer >= 0]
    pairs = [split(example) for example in rng.sample(examples, WRITTEN_EXAMPLES)]
    answers = sorted({answer for _, answer in pairs})
    rows = []
    for text, right in pairs:
        choices = [right, *rng.sample([answer for answer in answers if answer != right], len(CHOICES) - 1)]
        rng.shuffle(choices)
        rows.append([text, *choices, choices.index(right)])
    for file, part in (("train", rows[100:]), ("evaluation", rows[:100])):  # the second is not read
        with (out / f"{name}-{file}.csv").open("w", newline="", encoding="utf-8") as opened:
            csv.writer(opened).writerows([["text", *CHOICES, "answer"], *part])


def written_tasks(run: RunConfig, folder: Path) -> list[BenchmarkConfig]:
    tasks = []
    for name, source, split in (("activity", "hellaswag", split_activity), ("goal", "piqa", split_goal)):
        write = partial(write_task, name, BenchmarkConfig(name=source), split, run.store.downloads)
        files = {part: str(once(folder / name, write) / f"{name}-{part}.csv") for part in ("train", "evaluation")}
        tasks.append(BenchmarkConfig(name=name, context="text", choices=CHOICES, answer="answer", **files))
    return tasks


def render(run: RunConfig, own: BenchmarkConfig, examples: int, folder: Path) -> tuple[Path, Path]:
    """The train prompts of a benchmark, and those of the slice."""
    runner, alone = kept_in(folder, run), divided(run.model_copy(update={"benchmarks": (own,)}))
    loaded = steps.load_examples(alone.benchmarks[0])
    train_prompts = steps.render(alone, own.name, "train", loaded)
    further = steps.render(alone, own.name, "selection", loaded, examples)
    return runner.open(train_prompts), runner.open(further)


def follow(
    run: RunConfig, checkpoint: Path, own: BenchmarkConfig, prompts: tuple[Path, Path], out: Path
) -> dict[str, Any]:
    """Tune once; write what the model answers before, and after every epoch."""
    tuning, metric, tokenizer = run.tuning, headline_metric(own), load_tokenizer(checkpoint)
    torch.manual_seed(run.seed)
    with tempfile.TemporaryDirectory() as scratch:
        base = open_model(checkpoint, run.execution, Path(scratch), whole="tuning")
    encode = partial(encode_sample, tokenizer, context_length(base))
    train_prompts, further = prompts
    shots, held_out = read_prompts(train_prompts, "shots"), read_prompts(train_prompts, "held_out")
    selection = read_prompts(further, "selection")
    compared = {"held out": [encode(metric, p) for p in held_out], "slice": [encode(metric, p) for p in selection]}
    per_epoch = -(-len(shots) // tuning.batch_size)
    parts = []

    def answer(step: int, _: int) -> None:
        if step % per_epoch or len(parts) > 2 * (step // per_epoch):  # the last step is announced twice
            return
        for split, samples in compared.items():
            table = pd.DataFrame(map(asdict, outcomes(model, samples, tuning, tuning.micro_batch_tokens)))
            parts.append(table.assign(epoch=step // per_epoch, split=split, example=range(len(samples))))

    model = base
    answer(0, 0)
    model = add_adapter(base, tuning)
    samples = [encode(None, prompt) for prompt in shots]
    course = Course(samples, compared["held out"], run.seed, tuning.epochs, patience=tuning.epochs)  # never stops early
    measured, _ = train(model, course, tuning, Work(out, run.execution, progress=answer))
    pd.concat(parts, ignore_index=True).to_parquet(out / "answers.parquet")
    losses = [loss for loss in read_table(out / LOG, LOG_SCHEMA)["held_out_loss"].to_pylist() if loss is not None]
    pd.DataFrame({"epoch": range(len(losses)), "loss": losses}).to_parquet(out / "objective.parquet")
    return measured


def verdict(held: pd.DataFrame, epoch: int, than: int) -> bool:
    """Whether an epoch is better than another on the held-out examples, as `is_better` decides."""
    one, other = (
        [
            Outcome(row.loss, row.right, row.answer_loss)
            for row in held[held["epoch"] == e].sort_values("example").itertuples()
        ]
        for e in (than, epoch)
    )
    with tempfile.TemporaryDirectory() as scratch:
        return bool(is_better(write_comparison(Path(scratch), range(len(one)), one, other)))


def kept_epochs(answers: pd.DataFrame, objective: pd.Series) -> dict[str, int]:
    """Which epoch each stopping rule keeps; 0 is the untuned model."""
    held = answers[answers["split"] == "held out"]
    by_epoch = held.groupby("epoch")[["loss", "right"]].mean()
    last = int(by_epoch.index.max())
    best = 0
    for epoch in range(1, last + 1):
        best = epoch if verdict(held, epoch, best) else best
    return {
        "first epoch": 1,
        "last epoch": last,
        BY_LOSS: int(objective.idxmin()),
        "loss over the choices": int(by_epoch["loss"].idxmin()),
        "accuracy": int(by_epoch["right"].idxmax()),  # the first of equals
        "accuracy beyond its error, else loss over the choices": best,
    }


def gains(folder: Path) -> dict[str, np.ndarray]:
    """Gain in accuracy over the untuned model, by example of the slice, for each stopping rule."""
    answers = pd.read_parquet(folder / "answers.parquet")
    objective = pd.read_parquet(folder / "objective.parquet").set_index("epoch")["loss"]
    right = answers[answers["split"] == "slice"].pivot(index="example", columns="epoch", values="right").astype(float)
    return {rule: (right[kept] - right[0]).to_numpy() for rule, kept in kept_epochs(answers, objective).items()}


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def main(
    folder: Path,
    checkpoint: Path,
    config: Path,
    vary: Annotated[list[str], typer.Option(help="Fields of tuning, KEY=VALUE, spaces between them; repeatable.")],
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Repeatable; 0, 1 and 2 by default.")] = None,
    examples: Annotated[int, typer.Option(help="Train examples of the slice, of each task and seed.")] = 160,
    override: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Tune every task with every variant and seed; see the top of this file."""
    for setting in " ".join(vary).split():
        if not setting.startswith("tuning.") or setting.startswith(PROMPTS):
            raise InputError(f"--vary: got {setting!r}; allowed: fields of tuning, but not {', '.join(PROMPTS)}")
    run = load_config(str(config), override or [])
    variants = {name: load_config(str(config), [*(override or []), *name.split()]).tuning for name in vary}
    folder.mkdir(parents=True, exist_ok=True)
    measured: dict[tuple[str, str], dict[str, list[np.ndarray]]] = {}  # (variant, rule) → task → gains by seed
    for seed, own in product(seeds or range(3), [*run.benchmarks, *written_tasks(run, folder)]):
        seeded = run.model_copy(update={"seed": seed})
        prompts = render(seeded, own, examples, folder)
        for name, tuning in variants.items():
            tuned = seeded.model_copy(update={"tuning": tuning})
            out = once(folder / f"{own.name} {seed} {name}", partial(follow, tuned, checkpoint, own, prompts))
            for rule, values in gains(out).items():
                measured.setdefault((name, rule), {}).setdefault(own.name, []).append(values)
    first = np.concatenate([values for task in measured[vary[0], BY_LOSS].values() for values in task])
    rows = []
    for (name, rule), tasks in measured.items():
        by_task = {task: np.concatenate(values) for task, values in tasks.items()}
        every = np.concatenate([*by_task.values()])
        (gain, error), (difference, its_error) = mean_and_error(every), mean_and_error(every - first)
        row = {"variant": name, "rule": rule, "gain": gain, "error": error}
        row |= {"difference": difference, "its error": its_error}
        rows.append(row | {task: values.mean() for task, values in by_task.items()})
    table = pd.DataFrame(rows)
    table.to_parquet(folder / "objectives.parquet")
    print((table.set_index(["variant", "rule"]) * 100).round(1).to_string())


if __name__ == "__main__":
    typer.run(main)
