"""The table at the end: fault, times tried, survived, seconds of work that had to be done again."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass
class Trial:
    """One fault at one moment. `seconds_lost`: beyond an undisturbed run; `seconds`: of the whole trial."""

    fault: str
    moment: str
    survived: bool = False
    seconds_lost: float = 0.0
    seconds: float = 0.0


def table(trials: Sequence[Trial]) -> str:
    """The trials by fault, as Markdown."""
    lines = ["| fault | tried | survived | seconds lost | at most |", "|---|--:|--:|--:|--:|"]
    for fault in dict.fromkeys(trial.fault for trial in trials):
        group = [trial for trial in trials if trial.fault == fault]
        lost = [trial.seconds_lost for trial in group]
        survived = sum(trial.survived for trial in group)
        lines.append(f"| {fault} | {len(group)} | {survived} | {sum(lost):.1f} | {max(lost):.1f} |")
    return "\n".join(lines)


def write(trials: Sequence[Trial], folder: Path) -> None:
    """`faults.parquet` with every trial, and `faults.md` with the table."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([asdict(trial) for trial in trials]), folder / "faults.parquet")
    (folder / "faults.md").write_text(table(trials) + "\n")
