"""The table of a profile: how fast checkpoints read and write, and the memory that this takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import rich.table

from tailored_llama.evaluation import ProfileRow
from tailored_llama.reports.parts import megabytes, number, speedup
from tailored_llama.reports.tables import Cell, Column, Table, table_row, terminal


def speed_table(rows: Sequence[ProfileRow], other: str = "other") -> Table:
    """A row for each checkpoint and batch size; `other` names the checkpoint that speeds are compared with."""
    speeds = [Column(title) for verb in ("reads", "writes") for title in (f"{verb}\ntokens/s", f"× {other}")]
    columns = (Column("checkpoint", left=True), Column("batch"), *speeds, Column("peak\nmemory"))
    lines = []
    for row in rows:
        cells = [cell for phase in ("prefill", "decode") for cell in _speed(row, phase)]
        lines.append(table_row(row.checkpoint, number(row.batch, 0), *cells, megabytes(row.peak_memory_bytes)))
    return Table(columns, tuple(lines), (_note(rows, other),))


def _speed(row: ProfileRow, phase: str) -> list[Cell]:
    """Tokens per second, and how many times those of the other checkpoint they are, with the range of the pairs."""
    middle, low, high = (getattr(row, f"{phase}_speedup{end}") for end in ("", "_low", "_high"))
    ratio = Cell("–")
    if middle is not None:
        pairs = f"{number(low, 2)}–{number(high, 2)}"
        ratio = Cell(speedup(row, phase), (pairs,), f"{number(middle, 2)}\n{pairs}")
    return [Cell(number(getattr(row, f"{phase}_tokens_per_second"), 1)), ratio]


def _note(rows: Sequence[ProfileRow], other: str) -> str:
    """What was measured, and how to read it."""
    row = rows[0]
    threads = f", {row.threads} thread{'s' * (row.threads > 1)}" if row.device == "cpu" else ""
    types = " and ".join(dict.fromkeys(one.dtype for one in rows))
    base = " and ".join(dict.fromkeys(megabytes(one.base_memory_bytes) for one in rows))
    memory = "what torch allocated"
    if row.device == "cpu":
        memory = f"that of the process; {base} of it are the interpreter and libraries"
    compared = any(one.prefill_speedup for one in rows)
    against = f"; × {other}: the speed ÷ its, the median and range of pairs of passes, which take turns" * compared
    return (
        f"Timed on {row.device}{threads}, in {types}: {row.prompt_tokens} tokens a prompt, {row.new_tokens} new ones. "
        f"Median of {row.repeats} passes{against}. Memory is {memory}. Other machines give other numbers."
    )


def profile_table(rows: Sequence[ProfileRow]) -> rich.table.Table:
    """The table of 80 characters, with the size of each checkpoint below it."""
    table = speed_table(rows)
    sizes = {
        row.checkpoint: f"{row.checkpoint}: {number(row.parameters, 0)} parameters, {megabytes(row.weight_bytes)}"
        for row in rows
    }
    return terminal(replace(table, notes=(*sizes.values(), *table.notes)))
