"""Tables of costs: what models take to run, and what artifacts took to make."""

from collections.abc import Sequence
from dataclasses import replace

import rich.table

from tailored_llama.evaluation import ProfileRow
from tailored_llama.progress import duration
from tailored_llama.reports.parts import listed, megabytes, number, speedup
from tailored_llama.reports.tables import Cell, Column, Row, Table, table_row, terminal
from tailored_llama.store import Manifest


def speed_table(rows: Sequence[ProfileRow], other: str = "other") -> Table:
    """A row for each checkpoint and batch size; `other` names the checkpoint that speeds are compared with."""
    speeds = [Column(title) for verb in ("reads", "writes") for title in (f"{verb}\ntokens/s", f"× {other}")]
    columns = (Column("checkpoint", left=True), Column("batch"), *speeds, Column("peak\nmemory"))
    lines = []
    for row in rows:
        cells = [Cell(row.checkpoint), Cell(number(row.batch, 0))]
        for phase in ("prefill", "decode"):
            cells += [Cell(number(getattr(row, f"{phase}_tokens_per_second"), 1)), Cell("–")]
            middle, low, high = (getattr(row, f"{phase}_speedup{end}") for end in ("", "_low", "_high"))
            if middle is not None:
                pairs = f"{number(low, 2)}–{number(high, 2)}"
                cells[-1] = Cell(speedup(row, phase), (pairs,), f"{number(middle, 2)}\n{pairs}")
        lines.append(table_row(*cells, megabytes(row.peak_memory_bytes)))
    return Table(columns, tuple(lines), (_how_timed(rows, other),))


def _how_timed(rows: Sequence[ProfileRow], other: str) -> str:
    row, threads, memory = rows[0], "", "what torch allocated"
    if row.device == "cpu":
        base = listed(list(dict.fromkeys(megabytes(timed.base_memory_bytes) for timed in rows)))
        threads = f", {row.threads} thread{'s' * (row.threads > 1)}"
        memory = f"that of the process; {base} of it are the interpreter and libraries"
    types = listed(list(dict.fromkeys(timed.dtype for timed in rows)))
    against = f"; × {other}: the speed ÷ its, the median and range of pairs of passes, which take turns"
    passes = f"{row.repeats} passes{against if any(timed.prefill_speedup for timed in rows) else ''}"
    return (
        f"Timed on {row.device}{threads}, in {types}: {row.prompt_tokens} tokens a prompt, {row.new_tokens} new ones. "
        f"Median of {passes}. Memory is {memory}. Other machines give other numbers."
    )


def profile_table(rows: Sequence[ProfileRow]) -> rich.table.Table:
    """The table of 80 characters, with the size of each checkpoint below it."""
    table = speed_table(rows)
    sizes = [f"{row.checkpoint}: {number(row.parameters, 0)} parameters, {megabytes(row.weight_bytes)}" for row in rows]
    return terminal(replace(table, notes=(*dict.fromkeys(sizes), *table.notes)))


def cost_table(costs: Sequence[tuple[str, Manifest]]) -> Table:
    """Show the time that the artifacts of each stage and label took, and all together."""
    groups: dict[tuple[str, str], list[Manifest]] = {}
    for label, cost in costs:
        groups.setdefault((cost.stage, label), []).append(cost)
    rows = [_cost_row(*group, of_stage) for group, of_stage in groups.items()]
    if rows:
        rows.append(replace(_cost_row("together", "", [cost for _, cost in costs]), bold=True))
    columns = (Column("stage", left=True), Column("of", left=True), Column("wall time"), Column("peak memory"))
    return Table(columns, tuple(rows))


def _cost_row(stage: str, label: str, costs: Sequence[Manifest]) -> Row:
    seconds, memory = sum(cost.seconds for cost in costs), max(cost.peak_memory_bytes for cost in costs)
    return table_row(stage, label, duration(seconds), megabytes(memory) if memory else "–")
