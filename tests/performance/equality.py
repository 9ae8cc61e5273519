"""Every score of a checkpoint beside lm-evaluation-harness's own, over whole evaluation splits.

    python tests/performance/equality.py CHECKPOINT --out FOLDER

lm-eval's stock tasks and its HFLM score the documents; so does this library; every log-likelihood and every prediction
is compared. lm-eval's scores are kept in FOLDER in parts of at most 200 documents, evenly spaced over the split, so
that a run that was stopped goes on where it was. Prints a table and every document that is not decided beyond the
tolerance; writes FOLDER/equality-SHOTS.parquet.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from lm_eval.models.huggingface import HFLM

import harness
from tailored_llama.config import BenchmarkConfig
from tailored_llama.data import Prompt, encode_prompt, load_template, loglikelihoods, render
from tailored_llama.data.builtin import SEVEN
from tailored_llama.data.prompts import few_shot_header
from tailored_llama.evaluation.scoring import predict
from tailored_llama.models import load_model, load_tokenizer

PART = 200
TOLERANCE = 2e-3
HARNESS = load_template("harness")


def harness_scores(
    model: Any, tokenizer: Any, name: str, shots: int, limit: int | None, first: int | None, out: Path
) -> pd.DataFrame:
    """lm-eval's scores of `limit` evenly spaced documents (None: all), computed where they are not in `out` yet.

    Of their parts only the `first` ones (None: all), which are evenly spaced too.
    """
    task = harness.stock_task(name, harness.draw_shots(name, shots)[1] or harness.train_rows(name)[:1], shots)
    count = len(task.eval_docs) - (shots if name == "hellaswag" else 0)  # its shots are evaluation documents
    wanted = range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]
    parts = -(-len(wanted) // PART)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    tables = []
    for part in range(min(first or parts, parts)):
        file = out / f"{name}-{shots}{f'-limit{limit}' if limit else ''}-{part}of{parts}.parquet"
        if not file.exists():
            start = time.perf_counter()
            found = harness.evaluate(lm, task, wanted[part::parts])
            pd.DataFrame([{"example": index, **scores} for index, scores in found.items()]).to_parquet(file)
            print(f"{file.name}: {len(found)} documents, {time.perf_counter() - start:.0f} s", flush=True)
        tables.append(pd.read_parquet(file))
    return pd.concat(tables).sort_values("example").reset_index(drop=True)


def our_scores(
    model: Any, tokenizer: Any, name: str, shots: int, wanted: list[int]
) -> tuple[list[Prompt], list[list[float]]]:
    """This library's prompts and scores of the same documents."""
    benchmark = BenchmarkConfig(name=name)
    header = few_shot_header(benchmark, HARNESS, harness.draw_shots(name, shots)[0])
    examples = {example.index: example for example in harness.examples(name, "evaluation")}
    prompts = [render(benchmark, HARNESS, examples[index], header) for index in wanted]
    encoded = [encode_prompt(tokenizer, prompt, model.config.max_position_embeddings) for prompt in prompts]
    return prompts, loglikelihoods(model, encoded, 1024)


def margins(scores: list[list[float]], lengths: list[tuple[int, ...]] | None = None) -> np.ndarray[Any, Any]:
    """How far the best choice of every document is ahead of the second, in nats (per character with lengths)."""
    rows = [np.sort(np.array(row) / (np.array(lengths[i]) if lengths else 1)) for i, row in enumerate(scores)]
    return np.array([row[-1] - row[-2] for row in rows])


def compare(name: str, theirs: pd.DataFrame, prompts: list[Prompt], ours: list[list[float]]) -> dict[str, Any]:
    """One row of the table."""
    other = [list(row) for row in theirs["loglikelihoods"]]
    differences = [np.abs(np.array(a) - np.array(b)).max() for a, b in zip(ours, other, strict=True)]
    mine = predict(prompts, ours)
    row: dict[str, Any] = {"benchmark": name, "documents": len(prompts), "choices": sum(map(len, ours))}
    row["largest_difference"] = float(max(differences))
    lengths = [prompt.choice_lengths for prompt in prompts]
    for metric, column, by in (("acc", "prediction", None), ("acc_norm", "prediction_norm", lengths)):
        if metric not in theirs:
            continue
        hits = np.array(mine[column]) == np.array(mine["answer"])
        row[f"{metric}_ours"], row[f"{metric}_harness"] = float(hits.mean()), float(theirs[metric].mean())
        parted = np.array(mine[column]) != np.array(predict(prompts, other)[column])
        row[f"{metric}_parted"] = int((parted | (hits != (theirs[metric] == 1).to_numpy())).sum())
        nearest = 2 * TOLERANCE / (1 if by is None else np.array([min(n) for n in by]))  # both sides may move
        row[f"{metric}_undecided"] = theirs["example"].to_numpy()[margins(other, by) < nearest].tolist()
    return row


def write_record(record: Path, tables: dict[str, pd.DataFrame], shots: int) -> None:
    """Put lm-eval's scores into a file that a test reads, in place of those of the same benchmarks and shots."""
    new = pd.concat([table.assign(benchmark=name, num_fewshot=shots) for name, table in tables.items()])
    if record.is_file():
        old = pd.read_parquet(record)
        new = pd.concat([old[~(old["benchmark"].isin(list(tables)) & (old["num_fewshot"] == shots))], new])
    columns = ["benchmark", "num_fewshot", "example", "loglikelihoods", "acc", "acc_norm"]
    new.sort_values(columns[:3]).reindex(columns=columns).to_parquet(record, index=False)


def main(
    checkpoint: Path,
    out: Annotated[Path, typer.Option(help="Folder for lm-eval's scores and the table; one for each checkpoint.")],
    benchmark: Annotated[list[str], typer.Option(help="Repeatable; absent: all seven.")] = list(SEVEN),  # noqa: B006
    num_fewshot: Annotated[int, typer.Option(help="Solved examples before each question, the same for all.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Documents of each benchmark, evenly spaced; absent: all.")] = None,
    parts: Annotated[int | None, typer.Option(help="Only the first parts of each; absent: all.", min=1)] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Score in it here: reported, never held equal.")] = False,
    record: Annotated[Path | None, typer.Option(help="Parquet file to put lm-eval's scores into.")] = None,
) -> None:
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    theirs = {name: harness_scores(model, tokenizer, name, num_fewshot, limit, parts, out) for name in benchmark}
    if record:
        write_record(record, theirs, num_fewshot)
    if bfloat16:
        model = model.to(torch.bfloat16)
    rows = []
    for name, said in theirs.items():
        prompts, ours = our_scores(model, tokenizer, name, num_fewshot, said["example"].tolist())
        rows.append(compare(name, said, prompts, ours))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table.to_parquet(out / f"equality-{num_fewshot}{'-bfloat16' if bfloat16 else ''}.parquet")
    print(table.drop(columns=[c for c in table if c.endswith("undecided")]).to_string(index=False))
    good = table["largest_difference"].max() < TOLERANCE and not table.filter(like="parted").to_numpy(dtype=float).any()
    if not bfloat16:
        print("equal" if good else "NOT equal")
        raise typer.Exit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
